"""Distill a language model into its own INT4 self and say, with statistics, whether the difference is real."""

__version__ = "0.1.0"
