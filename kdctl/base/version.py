"""The version of kdctl, which every record names."""

__version__ = "0.1.0"
