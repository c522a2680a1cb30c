"""Methods of several scales or branches."""

from jsparse.hierarchical.nsa import nsa as nsa
