"""Measurements; see README."""
