"""Distill a language model into its own INT4 self and say, with statistics, whether the difference is real."""

from kdctl.base.version import __version__

__all__ = ["__version__"]
