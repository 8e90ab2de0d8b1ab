"""The few kinds of error that kdctl raises on purpose.

Each is also a standard-library type, so that callers of the Python interface need not know kdctl's names. The command
line turns every ``KdctlError`` into one message and exit code 2 (``cli/boundary.py``, which knows the rest too).
"""


class KdctlError(Exception):
    """Base of every error that is the input's fault, not kdctl's."""


class PresetError(KdctlError, ValueError):
    """A preset, an override or a combination of settings is not valid."""


class ModelError(KdctlError, ValueError):
    """A model reference cannot be resolved, or the model is of a kind that kdctl does not handle."""


class DataError(KdctlError, ValueError):
    """Prompts, a data set or a task cannot be read or does not fit."""


class StoreError(KdctlError, RuntimeError):
    """Something on disk is missing, damaged or was made with other settings."""


class ProcessError(KdctlError, RuntimeError):
    """Another process of the same run is gone."""


class ServerError(KdctlError, RuntimeError):
    """A server that writes completions is gone, refuses, or writes other ones than were asked for."""


class TrainingError(KdctlError, ArithmeticError):
    """Training cannot go on, because the loss is no longer a finite number, or has less to win than was asked for."""


LISTS = ("Model type should be one of", ", or contain one of the following strings")


def brief(error: BaseException, length: int = 300) -> str:
    """Return what another library's error says, on one line, without its lists of everything that exists."""
    text = " ".join(str(error).split())
    for start in LISTS:
        text = text.partition(start)[0].strip()
    return (text if len(text) <= length else f"{text[:length]} …") or type(error).__name__
