"""Quantization: the grid, the methods that choose it, shadow weights and the checkpoint format."""
