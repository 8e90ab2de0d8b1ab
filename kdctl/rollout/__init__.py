"""Rollouts: sampling completions and storing them."""
