"""The stages, one module each, and the pipeline that runs them in order."""

import kdctl.model  # noqa: F401 - before transformers, which else imports hqq
