"""What attention maps are like, tile by tile."""
