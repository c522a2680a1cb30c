"""Pallas GPU kernels: arrays in, arrays out, one folder per operation."""
