"""Prompts and data-set completions."""
