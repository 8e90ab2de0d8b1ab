"""The stages, one module each (layer 4)."""
