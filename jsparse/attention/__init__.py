"""Executors: attention for a plan, in several implementations behind one function."""
