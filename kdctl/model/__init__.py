"""One network: from a reference to weights, and one forward pass."""
