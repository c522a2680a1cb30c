"""Caches of keys and values, as data that pure functions change."""

from jsparse.cache import paged as paged
