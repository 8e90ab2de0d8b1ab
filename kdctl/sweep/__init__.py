"""Sweeps: many variants of one preset in one run folder, from wandb sweep files."""
