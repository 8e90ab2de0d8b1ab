"""Post-training quantization: the grid and the methods that choose it."""
