"""Student folders: a Hugging Face folder in compressed-tensors ``pack-quantized`` format.

Each quantized layer is three or four tensors: ``weight_packed`` (codes in int32 words), ``weight_scale``,
``weight_shape`` and, for asymmetric grids, ``weight_zero_point`` (packed along out_features). ``SHA256SUMS`` is written
last.
"""

import copy
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from huggingface_hub import save_torch_state_dict
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import StoreError
from kdctl.config.preset import QuantizeSection
from kdctl.model.configuration import read_config
from kdctl.model.folder import StoredTensors, read_tensors, weight_files
from kdctl.model.load import from_tensors
from kdctl.model.rows import Span
from kdctl.quant.affine import (
    Grid,
    QParams,
    QuantizedWeight,
    dequantize,
    grid_of,
    pack,
    unpack,
)
from kdctl.run.files import atomic_folder, naming, read_bytes, write_bytes, write_text, writing
from kdctl.run.hashes import known_sha256, written_sha256
from kdctl.run.record_files import remedy, write_record
from kdctl.run.records import QuantizeReport
from kdctl.run.sums import SUMS, listed_sums

HELDOUT = "heldout.parquet"
REPORT = "quantize.json"
CARD = "README.md"


@dataclass(frozen=True)
class Student:
    """A student in memory: a plain model that holds Q(W), and the codes and parameters behind it.

    Where processes divide it, each has its rows of both, until what it became is written: then the weights are whole
    and those of the model on meta.
    """

    model: PreTrainedModel
    weights: dict[str, QuantizedWeight]


@dataclass(frozen=True)
class StudentRows:
    """What one of several processes reads of a student folder: rows of its quantized layers."""

    config: PretrainedConfig
    generation: GenerationConfig | None
    weights: dict[str, QuantizedWeight]


def quantization_config(grid: Grid, ignore: list[str]) -> dict[str, Any]:
    """Describe the grid as compressed-tensors does.

    ``dequantize`` lets a plain ``from_pretrained`` load asymmetric folders too; other loaders ignore the key.
    """
    weights = QuantizationArgs(
        num_bits=grid.bits,
        type=QuantizationType.INT,
        symmetric=grid.symmetric,
        strategy=QuantizationStrategy.GROUP,
        group_size=grid.group_size,
        dynamic=False,
    )
    group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=None, output_activations=None)
    described = QuantizationConfig(
        quant_method="compressed-tensors",
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        config_groups={"group_0": group},
        ignore=ignore,
        kv_cache_scheme=None,
    )
    # what is not set here is left out, so that a newer compressed-tensors describes a grid in the same words
    return described.model_dump(mode="json", exclude_unset=True) | {"dequantize": True}


def packed_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the stored tensors of one layer."""
    bits = weight.grid.bits
    tensors = {
        f"{name}.weight_packed": pack(weight.codes, bits),
        f"{name}.weight_scale": weight.qparams.scale,
        f"{name}.weight_shape": torch.tensor(weight.codes.shape),
    }
    if not weight.grid.symmetric:
        tensors[f"{name}.weight_zero_point"] = pack(weight.qparams.zero_point, bits, 0)
    return tensors


def unpacked(name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
    """Undo ``packed_tensors``."""
    codes = unpack(tensors[f"{name}.weight_packed"], grid.bits, tensors[f"{name}.weight_shape"].tolist())
    return QuantizedWeight(codes, _qparams(name, tensors, grid), grid)


def unpacked_rows(name: str, stored: StoredTensors, grid: Grid, span: Span) -> QuantizedWeight:
    """Undo ``packed_tensors`` for some rows, which is all that is read of the codes."""
    rows, columns = stored[f"{name}.weight_shape"].tolist()
    part, whole = span(rows), _qparams(name, stored, grid)
    packed = stored.rows(f"{name}.weight_packed", part)
    qparams = QParams(whole.scale[part].clone(), whole.zero_point[part].clone())
    return QuantizedWeight(unpack(packed, grid.bits, (len(packed), columns)), qparams, grid)


def _qparams(name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QParams:
    scale = tensors[f"{name}.weight_scale"]
    if grid.symmetric:
        return QParams(scale, torch.full(scale.shape, grid.middle, dtype=torch.uint8))
    return QParams(scale, unpack(tensors[f"{name}.weight_zero_point"], grid.bits, scale.shape, 0))


def unquantized_tensors(model: PreTrainedModel, weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """Collect the tensors outside the quantized layers, tied ones once."""
    quantized = {f"{name}.weight" for name in weights}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name not in quantized and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found[name] = tensor.detach()
    return found


def dense_linears(model: nn.Module, weights: Container[str]) -> list[str]:
    """List the linear layers that stay in full precision, the output head among them."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in weights]


def save_student(
    folder: Path,
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    report: QuantizeReport,
    heldout: pa.Table,
    card: Callable[[QuantizeReport], str],
) -> None:
    """Write a student folder; it appears whole or not at all.

    heldout: its per-document sums on the yardstick. card: writes the text of README.md once the size is known.
    """
    tensors = unquantized_tensors(student.model, student.weights)
    for name, weight in student.weights.items():
        tensors |= packed_tensors(name, weight)
    grid = next(iter(student.weights.values())).grid
    config = copy.deepcopy(student.model.config)
    config.quantization_config = quantization_config(grid, dense_linears(student.model, student.weights))
    config.name_or_path = ""
    with atomic_folder(folder) as temporary:
        on_cpu = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
        with writing(temporary / "model.safetensors"):
            save_torch_state_dict(on_cpu, temporary)
        save_description(temporary, config, student.model.generation_config, tokenizer)
        report = report.model_copy(update={"student_bytes": folder_bytes(temporary)})
        write_record(temporary / REPORT, report)
        write_text(temporary / CARD, card(report))
        with writing(temporary / HELDOUT):
            pq.write_table(heldout, temporary / HELDOUT)
        write_sums(temporary)


def save_changed(folder: Path, source: Path, changed: Mapping[str, Tensor]) -> None:
    """Write a student folder again with some tensors changed, for a server to load; what was measured is left out.

    source: the folder as it was. It appears whole or not at all.
    """
    tensors = {**dict(read_tensors(source)), **changed}
    left = {SUMS, REPORT, CARD, HELDOUT}
    kept = [path for path in source.iterdir() if path.is_file() and path.name not in left]
    with atomic_folder(folder) as temporary:
        with writing(temporary / "model.safetensors"):
            save_torch_state_dict({name: one.to("cpu").contiguous() for name, one in tensors.items()}, temporary)
        for path in kept:
            if ".safetensors" not in path.name:
                write_bytes(temporary / path.name, read_bytes(path))
        write_sums(temporary)


def save_description(
    folder: Path,
    config: PretrainedConfig,
    generation: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write what a model folder holds beside weights."""
    with writing(folder / "config.json"):
        config.save_pretrained(folder)
    if generation is not None:
        with writing(folder / "generation_config.json"):
            generation.save_pretrained(folder)
    with writing(folder / "tokenizer.json"):
        tokenizer.save_pretrained(folder)


def folder_bytes(folder: Path) -> int:
    """Add up the sizes of the safetensors files."""
    return sum(path.stat().st_size for path in weight_files(folder))


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over every file of a folder, in the format of the sha256sum command."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{written_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    write_text(folder / SUMS, "".join(lines))


def check_sums(folder: Path) -> None:
    """Raise StoreError if a student folder has no SHA256SUMS or a file differs from them."""
    listed = listed_sums(folder)
    needed = {"config.json", *(path.name for path in folder.glob("*.safetensors"))}
    for name in sorted(needed | listed.keys()):
        check_file(folder, name, listed)


def check_file(folder: Path, name: str, listed: Mapping[str, str]) -> None:
    """Raise StoreError unless a file is there and is what SHA256SUMS says."""
    path = folder / name
    if not path.is_file() or known_sha256(path, proven=True) != listed.get(name):
        raise StoreError(f"{path} is missing or damaged: it does not match {SUMS}; {remedy(path)}")


def read_heldout(folder: Path) -> pa.Table:
    """Read the per-document sums beside a student. Raises StoreError if they are not those that were written."""
    check_file(folder, HELDOUT, listed_sums(folder))
    with naming(folder / HELDOUT):
        return pq.read_table(folder / HELDOUT)


def no_student(folder: Path, reason: str, what: str = "a student folder") -> StoreError:
    """Make the error of a folder that is none of a student: why, and where there is one."""
    if not folder.is_dir():
        reason = "that is no folder" if folder.exists() else "there is no such folder"
    way = "kdctl quantize makes student/ in a run folder, kdctl distill distill/VARIANT/final/"
    for inside in (folder / "student", folder / "final"):
        way = f"did you mean {inside}?" if (inside / "config.json").is_file() else way
    return StoreError(f"{folder} is not {what}: {reason}; {way}")


def stored_grid(config: PretrainedConfig, folder: Path) -> Grid:
    """Read the grid from a student folder's configuration. Raises StoreError if it gives none that kdctl has."""
    stored = config.to_dict().get("quantization_config")
    if not stored:
        raise no_student(folder, "by its config.json its weights are not quantized", "a pack-quantized student folder")
    if stored.get("format") != "pack-quantized":
        found = stored.get("format") or stored.get("quant_method")
        raise no_student(folder, f"its weights are quantized as {found!r:.80}", "a pack-quantized student folder")
    try:
        found = stored["config_groups"]["group_0"]["weights"]
        names = {"bits": "num_bits", "group_size": "group_size", "symmetric": "symmetric"}
        return grid_of(QuantizeSection.model_validate({name: found[key] for name, key in names.items()}))
    except (LookupError, TypeError, ValidationError):
        reason = "the group_0 of its config.json does not give bits, group size and symmetry of a grid that kdctl has"
        raise no_student(folder, reason, "a pack-quantized student folder") from None


def dense_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a configuration without its quantization part."""
    values = config.to_dict()
    values.pop("quantization_config")
    return type(config).from_dict(values)


def load_student(folder: Path, device: torch.device) -> Student:
    """Load a student folder, checking its integrity first.

    Raises StoreError if the folder is damaged or of another format.
    """
    check_sums(folder)
    return read_student(folder, device)


def load_student_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """Load what a student folder computes with, without its codes. Raises StoreError as ``load_student`` does."""
    check_sums(folder)
    return _read(folder, device).model


def read_student(folder: Path, device: torch.device) -> Student:
    """Read a student folder without transformers' quantization code and without looking at SHA256SUMS."""
    student = _read(folder, device)
    return Student(student.model, {name: _moved(weight, device) for name, weight in student.weights.items()})


def _read(folder: Path, device: torch.device) -> Student:
    """Read a student folder: the model onto a device, its codes into RAM."""
    config = read_config(folder)
    grid = stored_grid(config, folder)
    tensors = dict(read_tensors(folder))
    weights = {name: unpacked(name, tensors, grid) for name in _packed_layers(folder, tensors)}
    state = {name: tensor for name, tensor in tensors.items() if ".weight_" not in name}
    for name, weight in weights.items():
        state[f"{name}.weight"] = dequantize(weight.codes, weight.qparams, grid)
    config = dense_config(config)
    dtype = next(iter(weights.values())).qparams.scale.dtype
    model = from_tensors(config, state, dtype).to(device).eval()  # pyright: ignore[reportArgumentType]
    model.generation_config = _generation(folder) or model.generation_config
    return Student(model.requires_grad_(False), weights)


def read_rows(folder: Path, device: torch.device, span: Span) -> StudentRows:
    """Read some rows of a student folder's layers, checking its integrity first.

    Raises StoreError if the folder is damaged or of another format.
    """
    check_sums(folder)
    config, stored = read_config(folder), StoredTensors(folder)
    grid = stored_grid(config, folder)
    read = {name: unpacked_rows(name, stored, grid, span) for name in _packed_layers(folder, stored)}
    weights = {name: _moved(weight, device) for name, weight in read.items()}
    return StudentRows(dense_config(config), _generation(folder), weights)


def _packed_layers(folder: Path, stored: Iterable[str]) -> list[str]:
    """List the quantized layers of a folder. Raises StoreError if there are none."""
    names = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    if not names:
        raise StoreError(f"{folder} has no packed weights")
    return names


def _generation(folder: Path) -> GenerationConfig | None:
    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None


def _moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    qparams = QParams(weight.qparams.scale.to(device), weight.qparams.zero_point.to(device))
    return QuantizedWeight(weight.codes.to(device), qparams, weight.grid)
