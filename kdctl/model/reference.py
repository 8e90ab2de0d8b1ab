"""Model references to folders.

A reference is a Hub id, a local folder, a ``.gguf`` file, or ``pkg:PACKAGE/FILE`` (a file or folder inside an
installed package, found without importing it). Everything becomes a local folder of safetensors first; GGUF is
converted once into a cache keyed by the file's content, and so is the text part of a composite model.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError, brief
from kdctl.model.absent import check_fetched, check_no_adapter, why_no_model
from kdctl.model.composite import has_text_part, text_config, text_model
from kdctl.model.composite_tokenizer import check_kept, text_tokenizer
from kdctl.model.configuration import read_config, usable
from kdctl.model.folder import fingerprint
from kdctl.model.gguf import gguf_config, gguf_model
from kdctl.model.gguf_file import open_gguf
from kdctl.model.gguf_tokenizer import gguf_tokenizer
from kdctl.model.stops import GENERATION, stop_ids
from kdctl.run.files import atomic_folder, read_bytes, remove, sweep_up, write_bytes, writing
from kdctl.run.hashes import is_whole, known_sha256, note_files
from kdctl.run.paths import cache_dir
from kdctl.system.packages import PREFIX, inside_package

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
CONVERSION = 3  # raise it when a GGUF file is converted differently, so that older caches are not taken
TEXT_CONVERSION = 1  # the same for text parts
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]


def locate(
    reference: str, revision: str | None = None, offline: bool = False, files: Sequence[str] = HUB_FILES
) -> Path:
    """Find what a reference names: a folder, or a ``.gguf`` file. Downloads ``files`` of a Hub id unless ``offline``.

    Raises ModelError saying what was looked for and where.
    """
    if reference.startswith(PREFIX):
        return _checked(inside_package(reference, ModelError))
    path = Path(reference).expanduser()
    if path.exists():
        return _checked(path)
    if path.is_symlink():
        raise ModelError(f"{path} is a link to {path.readlink()}, where nothing is")
    if "://" in reference:
        raise ModelError(f"{reference!r:.300} is an address; give the Hub id, owner/name, or a folder or file here")
    if path.is_absolute() or reference.startswith((".", "~")) or not HUB_ID.match(reference):
        raise ModelError(
            f"no model at {path.absolute()}; give a Hub id, a model folder, a .gguf file or pkg:PACKAGE/FILE"
        )
    return _from_hub(reference, revision, offline, files)


def _checked(path: Path) -> Path:
    """Return what may be a model, a file or a folder. Raises ModelError saying why it is none."""
    if path.is_file() and path.suffix == ".gguf":
        check_fetched(path)
        return path
    if path.is_dir():
        check_no_adapter(path)
        check_fetched(path)
    if not (path / "config.json").is_file():
        raise ModelError(why_no_model(path))
    return path


def _from_hub(reference: str, revision: str | None, offline: bool, files: Sequence[str]) -> Path:
    try:
        folder = snapshot_download(reference, revision=revision, allow_patterns=list(files), local_files_only=offline)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the disk
        raise ModelError(
            f"no model {reference!r}: there is no such folder here ({Path(reference).absolute()}), and "
            f"{_why_not(error, offline)}"
        ) from None
    check_no_adapter(Path(folder))
    return Path(folder)


def _why_not(error: Exception, offline: bool) -> str:
    """Say why the Hub gives no model, and what to do."""
    if offline:
        return "the local Hub cache (offline mode) does not have it; fetch it once with runtime.offline=false"
    if isinstance(error, GatedRepoError):
        return "the Hugging Face Hub gives it only to those who accepted its terms: do so on its page, and log in"
    if isinstance(error, RevisionNotFoundError):
        return "the Hugging Face Hub has no such revision of it; correct teacher.revision"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hugging Face Hub has none of this name that you may see; correct it, or log in if it is private"
    if isinstance(error, HFValidationError):
        return f"that is no name of the Hugging Face Hub: {brief(error)}"
    return (
        "the Hugging Face Hub cannot be reached, while the local Hub cache does not have it whole "
        f"({_innermost(error)}); check the network, or name a folder"
    )


def _innermost(error: BaseException) -> str:
    """Return what began a chain of errors, in few words."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {brief(error):.150}"


def model_folder(reference: str, dtype: torch.dtype, revision: str | None = None, offline: bool = False) -> Path:
    """Return a folder with config, safetensors and tokenizer, made on first use of a GGUF file or a composite model."""
    path = locate(reference, revision, offline)
    if path.is_file():
        return convert_gguf(path, dtype)
    return convert_text(path, dtype) if has_text_part(path) else path


def cache_of(path: Path, dtype: torch.dtype) -> Path | None:
    """Name the cache folder of what is converted on first use, None for a model folder that is used as it is."""
    if path.is_file():
        return gguf_cache(path, dtype)
    return text_cache(path, dtype) if has_text_part(path) else None


def convert_gguf(path: Path, dtype: torch.dtype) -> Path:
    """Dequantize a GGUF file into a cached folder, keyed by the file's content and the dtype.

    Raises ModelError for a file that is damaged, or of which something would be lost; nothing is cached then.
    """
    folder = gguf_cache(path, dtype)
    if is_whole(folder):
        return folder
    file = open_gguf(path)
    gguf_config(file)
    tokenizer = gguf_tokenizer(file)
    _keep(folder, gguf_model(file, dtype), tokenizer)
    return folder


def convert_text(path: Path, dtype: torch.dtype) -> Path:
    """Save the text part of a composite model as a cached folder, keyed by its files and the dtype.

    Raises ModelError if something would be lost or other; nothing is cached then.
    """
    folder = text_cache(path, dtype)
    if is_whole(folder):
        return folder
    config, tokenizer = text_config(path), text_tokenizer(path)
    stop_ids(path, tokenizer, config.vocab_size)
    _keep(folder, text_model(path, config, dtype), tokenizer, path / GENERATION)
    return folder


def _keep(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation: Path | None = None
) -> None:
    """Write a folder of the cache. generation: the file instead of transformers' own, or none."""
    sweep_up(folder.parent)
    with atomic_folder(folder) as temporary:
        with writing(temporary / "model.safetensors"):
            model.save_pretrained(temporary)
        with writing(temporary / "tokenizer.json"):
            tokenizer.save_pretrained(temporary)
        if generation is not None:
            remove(temporary / GENERATION)
            if generation.is_file():
                write_bytes(temporary / GENERATION, read_bytes(generation))
            check_kept(temporary, tokenizer, generation.parent)
        note_files(temporary)


def gguf_cache(path: Path, dtype: torch.dtype) -> Path:
    """Name the cache folder of a GGUF file. It is whole if it says so itself."""
    made_by = f"{str(dtype).removeprefix('torch.')}-v{CONVERSION}"
    return cache_dir() / "gguf" / f"{path.stem}-{known_sha256(path)[:16]}-{made_by}"


def text_cache(path: Path, dtype: torch.dtype) -> Path:
    """Name the cache folder of a composite model's text part: by its weights, and all that may say how to read them."""
    total = hashlib.sha256(fingerprint(path).encode())
    kinds = [kind for kind in (*HUB_FILES, "additional_chat_templates/*.jinja") if kind != "*.safetensors"]
    for file in sorted(file for kind in kinds for file in path.glob(kind)):
        total.update(f"{file.relative_to(path)}:{known_sha256(file)}\n".encode())
    made_by = f"{str(dtype).removeprefix('torch.')}-v{TEXT_CONVERSION}"
    return cache_dir() / "text" / f"{total.hexdigest()[:16]}-{made_by}"


def find_config(
    reference: str, dtype: torch.dtype, revision: str | None = None, offline: bool = False
) -> PretrainedConfig:
    """Read the configuration of what a reference names, without its weights; of a Hub id it downloads nothing else."""
    path = locate(reference, revision, offline, ["config.json"])
    if path.is_file() and is_whole(cached := gguf_cache(path, dtype)):
        path = cached
    if path.is_file():
        return usable(gguf_config(open_gguf(path)), path)
    return text_config(path) if has_text_part(path) else read_config(path)
