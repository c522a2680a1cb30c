"""Flax: the only place that imports it."""
