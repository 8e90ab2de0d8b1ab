"""Distillation: divergences, shadow weights, what each row of a step is, and the loop."""
