"""Numerics that two methods or more share. Knows no method and no paper."""
