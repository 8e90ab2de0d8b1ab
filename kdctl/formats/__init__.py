"""Folders and files for others: compressed-tensors, GGUF, model cards, and what proves them."""
