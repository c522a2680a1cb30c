"""Who may see whom from positions alone: masks that compose, and methods that are only a mask."""

from jsparse.masks.causal import causal as causal
