"""Plans from q and k; no parameters."""
