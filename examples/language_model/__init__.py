"""A small byte-level language model built on jsparse.nn."""
