"""What an error means to whoever runs a command: the input, the disk, the network, the memory, or a bug of kdctl.

Kinds of libraries are known by name, so that nothing needs to be imported to look at an error.
"""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path
from typing import NamedTuple

from kdctl.base.errors import KdctlError, brief

DONE = "what was finished is on disk, and the same command goes on from there"
MEMORY = (
    "there is not enough memory ({why}); lower distill.micro_batch_size (with gradient_accumulation higher), "
    "distill.max_tokens, rollout.batch_size or eval.batch_size, or use a smaller teacher; kdctl plan says what takes "
    "how much"
)
NETWORK = "the network or the server failed: {why}; " + DONE + "; runtime.offline=true uses what is here already"
DAMAGED = "a file is damaged or not what its name says{file}: {why}; restore it, or delete it if kdctl wrote it"
NESTED = "something in the input is nested too deeply to be read{file}; " + DONE
KINDS = {
    "torch.OutOfMemoryError": MEMORY,
    "builtins.MemoryError": MEMORY,
    "wandb.errors.errors.Error": "wandb: {why}; tracking.wandb=offline keeps metrics here, off does without it; "
    + DONE,
    "huggingface_hub.errors.HfHubHTTPError": NETWORK,
    "huggingface_hub.errors.OfflineModeIsEnabled": NETWORK,
    "httpx.HTTPError": NETWORK,
    "httpx2.HTTPError": NETWORK,
    "requests.exceptions.RequestException": NETWORK,
    "urllib3.exceptions.HTTPError": NETWORK,
    "aiohttp.client_exceptions.ClientError": NETWORK,
    "fsspec.exceptions.FSTimeoutError": NETWORK,
    "datasets.exceptions.DatasetsError": "a data set cannot be read: {why}",
    "pyarrow.lib.ArrowException": DAMAGED,
    "safetensors._safetensors_rust.SafetensorError": DAMAGED,
    "json.decoder.JSONDecodeError": DAMAGED,
    "tomllib.TOMLDecodeError": DAMAGED,
    "yaml.error.YAMLError": DAMAGED,
    "builtins.UnicodeDecodeError": DAMAGED,
    "builtins.EOFError": DAMAGED,
    "zlib.error": DAMAGED,
    "builtins.RecursionError": NESTED,
}
TEXTS = {
    "not enough memory": MEMORY,
    "can't allocate memory": MEMORY,
    "out of memory": MEMORY,
    "std::bad_alloc": MEMORY,
    "ALLOC_FAILED": MEMORY,
    "can't start new thread": "the system allows no further thread; raise ulimit -u, or set OMP_NUM_THREADS",
    "Could not determine home directory": "no home folder is known; set HOME, or KDCTL_CACHE to where a cache may lie",
    "NVIDIA driver": "the GPU cannot be used: {why}; runtime.device=cpu does without",
    "integer string conversion": "a whole number in the input has thousands of digits; nothing here counts so far",
    "no kernel image": "this torch was not built for this GPU: {why}; runtime.device=cpu does without",
}
"""What libraries say in a RuntimeError, which is no kind of its own."""


class Ending(NamedTuple):
    """The message and the exit code that a command ends with."""

    message: str
    code: int


def explain(error: BaseException) -> Ending:
    """Return how a command ends that raised an error; code 70 is a bug, whose message only names it."""
    if isinstance(error, KdctlError):
        return Ending(str(error), 2)
    if isinstance(error, KeyboardInterrupt):
        return Ending(f"{str(error) or 'stopped'}; {DONE}", vars(error).get("code", 130))
    text = _of_kind(error) or _import_failed(error)
    if text is None and isinstance(error, OSError):
        text = of_system(error)
    if text is None:
        return Ending(f"{type(error).__name__}: {brief(error)}", 70)
    return Ending(text, 2)


def _placed(name: str) -> str:
    """Say where a file lies that is named without its folder."""
    return name if os.sep in name else os.path.abspath(name)


def of_system(error: OSError) -> str:
    """Put an error of the operating system in words, with its path."""
    if error.errno is None:
        return f"{brief(error)}; {DONE}"
    names = [_placed(str(name)) for name in (error.filename, error.filename2) if name is not None]
    hint = {errno.EMFILE: " (ulimit -n raises the limit)", errno.ENOSPC: " (free some space, or use another place)"}
    what = " → ".join(names) or "a file or a connection"
    return f"cannot read or write {what}: {error.strerror}{hint.get(error.errno, '')}; {DONE}"


def _of_kind(error: BaseException) -> str | None:
    """Look an error up by its class, or by what it says where its class says nothing."""
    kinds = [f"{each.__module__}.{each.__qualname__}" for each in type(error).__mro__]
    found = next((KINDS[kind] for kind in kinds if kind in KINDS), None)
    if found is None and isinstance(error, RuntimeError | ValueError):
        found = next((words for text, words in TEXTS.items() if text in str(error)), None)
    return found.format(why=brief(error), file=_file_of(error)) if found else None


def _file_of(error: BaseException) -> str:
    """Name the file that was being read: the nearest path that a function on the way to the error works on."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            if isinstance(value, Path) and value.is_file():
                return f", {value}"
    return ""


def _import_failed(error: BaseException) -> str | None:
    """Say which package cannot be imported, if a missing or broken one is the reason."""
    running = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
               if frame.f_code.co_name == "<module>"]  # fmt: skip
    package = running[-1].partition(".")[0] if running else ""
    if isinstance(error, ImportError) and error.name and not error.name.startswith("kdctl"):
        package = error.name.partition(".")[0]
    if isinstance(error, SyntaxError) and error.filename and "kdctl" not in Path(error.filename).parts:
        package = str(error.filename)
    if package in ("", "kdctl", "__main__"):
        return None
    said = brief(error)
    blamed = [name for name, value in os.environ.items() if len(value) > 2 and value in said]
    if isinstance(error, ValueError) and blamed:
        return f"the environment variable {blamed[0]} keeps the package {package} from being imported: {said}; unset it"
    return (
        f"the package {package} is missing or broken ({type(error).__name__}: {said}); install kdctl and "
        "what it needs again, in a new environment if that does not help"
    )
