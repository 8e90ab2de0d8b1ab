"""Presets: their schema, and how a name and overrides become one."""
