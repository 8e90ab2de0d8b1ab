"""A student folder in the formats of other programs: GGUF for llama.cpp, plain safetensors, hqq's own."""

import filecmp
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import ModelError, StoreError
from kdctl.config.preset import Form
from kdctl.formats.gguf import check_layout, quantized_blocks, tokenizer_fields, write_gguf
from kdctl.formats.records import ExportFormat, ExportReport
from kdctl.formats.student import Student, load_student, no_student, save_description, stored_grid
from kdctl.model.configuration import read_config
from kdctl.model.folder import fingerprint, weights_bytes
from kdctl.model.stops import stop_ids
from kdctl.model.tokenizer import load_tokenizer
from kdctl.quant.affine import Grid, QuantizedWeight, grouped
from kdctl.run.files import atomic_folder, atomic_path, remove, scratch_folder, writing
from kdctl.run.locks import Say, holding, lock_of
from kdctl.run.paths import require_free_space

GGUF_FILE = "model.gguf"
HQQ_BYTE_CODES = {8: 1, 4: 2, 2: 4}  # codes in a byte; 3-bit codes are padded to whole words instead
Writer = Callable[[Student, PreTrainedTokenizerBase, Path], dict[str, Any]]


def export(
    folder: Path, to: ExportFormat, out: Path | None = None, exact: bool = False, say: Say = lambda _: None
) -> ExportReport:
    """Write a student folder in another format. exact: let GGUF blocks take 10 % more space rather than round.

    Where the place holds the very same export, as after a kill at the last moment, that is reported. ``say`` is told
    so, and of another process that writes there, which is waited for. Raises StoreError for a folder that is no whole
    student or a place that is taken by anything else, ModelError for a model or a grid that the format does not hold.
    """
    place = out or folder.parent / f"{folder.name}-{to}"
    _check_places(folder, place)
    with holding(lock_of(place), f"the export {place}", say):
        if not place.exists():
            return _export(folder, to, place, exact)
        with scratch_folder(place) as beside:
            found = _export(folder, to, beside / place.name, exact)
            if not _same_bytes(beside / place.name, place):
                raise _taken(place)
        say(f"{place} is this export already")
        return found.model_copy(update={"path": str(place)})


def in_form(folder: Path, form: Form, place: Path) -> Path:
    """Return a student folder as a server takes it: itself where that is packed, else what it is exported to."""
    if form == "packed":
        return folder.resolve()
    to = place.with_name(f"{place.name}.gguf" if form == "gguf" else f"{place.name}-{form}")
    remove(to)
    return Path(export(folder, form, to).path).resolve()


def _export(folder: Path, to: ExportFormat, place: Path, exact: bool) -> ExportReport:
    """Write a student folder to a place that is free."""
    config = read_config(folder)
    grid = stored_grid(config, folder)
    if to == "gguf":
        check_layout(config, grid)
    tokenizer = load_tokenizer(folder, config.model_type)
    if to == "gguf":
        tokenizer_fields(tokenizer, config.vocab_size)
    require_free_space(place.parent, _needed_bytes(folder, grid, to), f"export to {to}", "--out")
    student = load_student(folder, torch.device("cpu"))
    if to == "gguf":
        stops = stop_ids(folder, tokenizer, config.vocab_size)
        found = export_gguf(student, tokenizer, place, exact, stops)
    else:
        found = {"dense": export_dense, "hqq": export_hqq}[to](student, tokenizer, place)
    size = sum(path.stat().st_size for path in _files(place))
    return ExportReport(format=to, path=str(place), weights=fingerprint(folder), size_bytes=size, **found)


def _check_places(folder: Path, place: Path) -> None:
    if not (folder / "config.json").is_file():
        raise no_student(folder, "it has no config.json")
    if place.exists() and not _looks_exported(place):
        raise _taken(place)


def _taken(place: Path) -> StoreError:
    return StoreError(f"{place} exists and is not overwritten; remove it or name another place with --out")


def _looks_exported(place: Path) -> bool:
    """Tell at a glance whether a place may hold an export, so that nothing is exported to compare with other files."""
    if place.is_dir():
        return any((place / name).is_file() for name in (GGUF_FILE, "config.json"))
    return place.suffix == ".gguf"


def _same_bytes(one: Path, other: Path) -> bool:
    """Compare two files, or all files of two folders."""
    first, second = ({path.relative_to(top): path for path in _files(top)} for top in (one, other))
    return first.keys() == second.keys() and all(filecmp.cmp(first[name], second[name], False) for name in first)


def _files(place: Path) -> list[Path]:
    return [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]


def _needed_bytes(folder: Path, grid: Grid, to: str) -> int:
    """Bound what a format takes from the size of the student's folder."""
    return weights_bytes(folder) * (16 if to == "dense" else 9) // grid.bits


def export_dense(student: Student, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Write Q(W) as plain safetensors that need no quantization code to open."""
    with atomic_folder(folder) as temporary:
        with writing(temporary / "model.safetensors"):
            student.model.save_pretrained(temporary)
        with writing(temporary / "tokenizer.json"):
            tokenizer.save_pretrained(temporary)
    return {}


def export_gguf(
    student: Student, tokenizer: PreTrainedTokenizerBase, place: Path, exact: bool, stops: Sequence[int] = ()
) -> dict[str, Any]:
    """Write one GGUF file: at ``place`` if it is named *.gguf, else ``model.gguf`` in a folder of that name."""
    blocks = quantized_blocks(student, exact)
    name = place.stem if place.suffix == ".gguf" else place.name
    if place.suffix == ".gguf":
        with atomic_path(place) as temporary:
            write_gguf(temporary, student, tokenizer, blocks, name, stops)
    else:
        with atomic_folder(place) as temporary, writing(temporary / GGUF_FILE):
            write_gguf(temporary / GGUF_FILE, student, tokenizer, blocks, name, stops)
    return {
        "block_type": next(iter(blocks.values())).kind.name,
        "exact_blocks": sum(each.exact for each in blocks.values()) / sum(each.blocks for each in blocks.values()),
        "largest_difference": max(each.largest_difference for each in blocks.values()),
        "rounded_difference": max(each.rounded_difference for each in blocks.values()),
    }


def export_hqq(student: Student, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Write a folder that ``AutoHQQHFModel.from_quantized`` opens.

    Its weights file is hqq's own ``qmodel.pt``, written by hqq and opened by it with ``weights_only``; hqq reads no
    other. Raises ModelError for shapes that hqq cannot pack.
    """
    from hqq.models.hf.base import AutoHQQHFModel  # prints warnings of its own when imported

    weights = hqq_weights(student.model, student.weights)
    student.model.config.architectures = [type(student.model).__name__]  # hqq picks the class by it
    with atomic_folder(folder) as temporary:
        save_description(temporary, student.model.config, student.model.generation_config, tokenizer)
        with writing(temporary / "qmodel.pt"):
            AutoHQQHFModel.save_weights(weights, str(temporary))
    return {}


def hqq_weights(model: PreTrainedModel, weights: dict[str, QuantizedWeight]) -> dict[str, dict[str, Any]]:
    """Return the state of every leaf module, quantized ones as HQQLinear stores them."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        state = {key: tensor.detach() for key, tensor in module.state_dict().items()}
        if name in weights:
            found[name] = hqq_state(name, weights[name], state.get("bias"))
        elif state and not list(module.children()):
            found[name] = state
    return found


def hqq_state(name: str, weight: QuantizedWeight, bias: Tensor | None) -> dict[str, Any]:
    """Return the state of one HQQLinear: W = (q − zero) · scale, groups along in_features (axis 1)."""
    from hqq.core.quantize import Quantizer

    grid, scale = weight.grid, weight.qparams.scale
    groups, together = scale.numel(), HQQ_BYTE_CODES.get(grid.bits, 1)
    if groups % together:
        raise ModelError(
            f"{name}: hqq packs {grid.bits}-bit codes of {together} groups into a byte, and {groups} groups cannot be "
            f"shared out; use another group_size than {grid.group_size}, or --to dense"
        )
    packing = Quantizer.bit_to_packing[grid.bits]
    codes = grouped(weight.codes, grid.group_size).flatten(0, 1)
    state = {
        "W_q": Quantizer.pack[packing](codes),
        "scale": scale.reshape(-1, 1),
        "zero": weight.qparams.zero_point.to(scale.dtype).reshape(-1, 1),
        "nbits": grid.bits,
        "group_size": grid.group_size,
        "shape": weight.codes.shape,
        "axis": 1,
        "packing": packing,
        "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "compute_dtype": scale.dtype,
        "offload_meta": False,
        "stores_quant_config": True,
        "channel_wise": True,
        "optimize": False,
        "round_zero": True,
    }
    return state if bias is None else state | {"bias": bias}
