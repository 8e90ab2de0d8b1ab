"""Distillation: divergences, batches, training state and the loop."""
