"""Attention over listed tiles."""
