"""The best columns of every row of a product, which is never written."""
