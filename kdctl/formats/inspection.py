"""One student folder under inspection: every check that ``kdctl verify`` makes, each a method.

A check returns a line on what it found. It raises StoreError where the folder fails, Unknown where it cannot be made.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.base.errors import KdctlError, StoreError
from kdctl.config.preset import Preset
from kdctl.eval import distribution as metrics
from kdctl.formats.layout import expected_tensors
from kdctl.formats.proof import check_finite, check_grid, check_names, decompressed, some
from kdctl.formats.student import (
    HELDOUT,
    REPORT,
    SUMS,
    Student,
    check_sums,
    folder_bytes,
    no_student,
    read_student,
    stored_grid,
)
from kdctl.model import tokenizer as tokens
from kdctl.model.configuration import read_config
from kdctl.model.context import reach_of
from kdctl.model.folder import fingerprint, read_tensors
from kdctl.model.load import load_model, ready
from kdctl.model.stops import stop_ids
from kdctl.model.tokenizer import check_vocabulary
from kdctl.quant.affine import Grid, pack
from kdctl.quant.apply import layer_errors
from kdctl.rollout.store import RolloutStore
from kdctl.run.documents import from_table
from kdctl.run.files import naming
from kdctl.run.measures import FORWARD_KL, fixed
from kdctl.run.paths import enclosing_run
from kdctl.run.record_files import read_record
from kdctl.run.records import QuantizeReport

CLOSE = 1e-9
"""Relative difference that another order of float64 additions may leave."""
KL_CLOSE = 0.01
"""Relative difference that other hardware may leave in a KL of bf16 models."""

OWN_KEYS = {"dtype", "transformers_version", "name_or_path", "_name_or_path", "architectures", "quantization_config"}
"""Settings that a student need not share with its teacher."""


class Unknown(KdctlError):
    """A check cannot be made; the text is the reason."""


@dataclass(frozen=True)
class Teacher:
    """Where the teacher is, or the reason why it cannot be had.

    fingerprint: of its weights, where that is known already. asked: the user named it, so it must be the right one.
    """

    folder: Path | None
    dtype: torch.dtype = torch.bfloat16
    fingerprint: str | None = None
    asked: bool = False
    reason: str = "the folder lies in no run folder that names its teacher; name it with --teacher"


class Inspection:
    """One student folder under inspection; each part is read once, when a check first needs it."""

    def __init__(self, folder: Path, teacher: Teacher, device: torch.device):
        if not (folder / REPORT).is_file() and not (folder / SUMS).is_file():
            raise no_student(folder, f"it has neither {REPORT} nor {SUMS}, and kdctl writes both")
        self.folder = folder
        self.teacher = teacher
        self.device = device

    @cached_property
    def report(self) -> QuantizeReport:
        """What the folder says of itself."""
        return read_record(self.folder / REPORT, QuantizeReport)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return read_config(self.folder)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return dict(read_tensors(self.folder))

    @cached_property
    def student(self) -> Student:
        """The folder as kdctl loads it."""
        return read_student(self.folder, self.device)

    @cached_property
    def plain(self) -> PreTrainedModel:
        """The folder as a plain call of transformers loads it."""
        model, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore
            self.folder, output_loading_info=True, trust_remote_code=False
        )
        wrong = sorted({*found["missing_keys"], *found["unexpected_keys"]})
        if wrong:
            raise StoreError(f"transformers finds missing or unexpected tensors: {some(wrong)}")
        return ready(model, self.device)

    @cached_property
    def teacher_folder(self) -> Path:
        """The teacher's folder, if it is the one that the student was made from."""
        if self.teacher.folder is None:
            raise Unknown(self.teacher.reason)
        found = self.teacher.fingerprint or fingerprint(self.teacher.folder)
        if found != self.report.teacher:
            raise Unknown(f"{self.teacher.folder} is not the teacher that the folder was made from ({found[:16]})")
        return self.teacher.folder

    @cached_property
    def teacher_model(self) -> PreTrainedModel:
        """The teacher in memory."""
        return load_model(self.teacher_folder, self.teacher.dtype, self.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer."""
        return tokens.open_tokenizer(self.folder)

    # --- from the folder alone ----------------------------------------------------------------------------------------

    def integrity(self) -> str:
        """Compare every file with SHA256SUMS."""
        if not (self.folder / SUMS).is_file():
            raise Unknown(f"no {SUMS}: the folder is unfinished, or incompletely copied")
        check_sums(self.folder)
        listed = {line.partition("  ")[2] for line in (self.folder / SUMS).read_text(encoding="utf-8").splitlines()}
        files = {p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()}
        strangers = sorted(name for name in files - listed - {SUMS} if not name.startswith("."))
        if strangers:
            raise StoreError(f"{SUMS} does not cover {some(strangers)}")
        return f"{len(listed)} files match {SUMS}"

    def record(self) -> str:
        """Compare quantize.json with the configuration, the files and the per-document table beside it."""
        report, grid = self.report, stored_grid(self.config, self.folder)
        if (report.bits, report.group_size, report.symmetric) != (grid.bits, grid.group_size, grid.symmetric):
            recorded = Grid(report.bits, report.group_size, report.symmetric)
            raise StoreError(f"{REPORT} was written for {recorded}, config.json says {grid}")
        if report.student_bytes != folder_bytes(self.folder):
            raise StoreError(
                f"{REPORT} says {report.student_bytes} bytes, the tensors take {folder_bytes(self.folder)}"
            )
        found = from_table(_heldout(self.folder)).mean(FORWARD_KL)
        _same("KL", found, report.distribution.forward_kl.value, CLOSE)
        return f"{REPORT} agrees with config.json, the files' size and {HELDOUT}"

    def shapes(self) -> str:
        """Compare the stored tensors with those that the configuration demands."""
        expected = expected_tensors(self.config, self.folder)
        check_names(self.tensors, expected)
        for name, form in expected.items():
            form.check(name, self.tensors[name])
        return f"{len(expected)} tensors have the shapes and types that config.json demands, none is missing or extra"

    def numbers(self) -> str:
        """Look at scales, zero points, the bits that fill up packed words, and the unquantized numbers."""
        for name, weight in self.student.weights.items():
            check_grid(name, weight)
            zero, bits = weight.qparams.zero_point, weight.grid.bits
            if weight.codes.shape[1] * bits % 32:
                _refill(f"{name}.weight_packed", pack(weight.codes, bits), self.tensors)
            if weight.codes.shape[0] * bits % 32 and not weight.grid.symmetric:
                _refill(f"{name}.weight_zero_point", pack(zero, bits, 0), self.tensors)
        for name, tensor in self.tensors.items():
            check_finite(name, tensor)
        return f"scales of {len(self.student.weights)} layers are finite and positive, zero points are codes"

    @torch.no_grad()
    def loaders(self) -> str:
        """Compare the weights of kdctl's loader, transformers' plain loader and the reference decompression."""
        mine, theirs = self.student.model.state_dict(), self.plain.state_dict()
        if mine.keys() != theirs.keys():
            raise StoreError(
                f"kdctl and transformers load different tensors: {some(sorted(mine.keys() ^ theirs.keys()))}"
            )
        for name, tensor in mine.items():
            if tensor.dtype != theirs[name].dtype or not torch.equal(tensor, theirs[name]):
                raise StoreError(f"kdctl and transformers load different numbers for {name}")
        for name in self.student.weights:
            if not torch.equal(self._reference(name).to(self.device), mine[f"{name}.weight"]):
                raise StoreError(f"compressed-tensors decompresses {name} to other numbers than kdctl")
        return f"kdctl, transformers and compressed-tensors agree on {len(mine)} tensors to the bit"

    def _reference(self, name: str) -> Tensor:
        """Decompress one layer as the package compressed-tensors does."""
        group = self.config.to_dict()["quantization_config"]["config_groups"]["group_0"]
        parts = {key: tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}.weight_")}
        return decompressed(name, parts, QuantizationScheme.model_validate(group))

    @torch.inference_mode()
    def logits(self) -> str:
        """Compare the logits of kdctl's loader and transformers' on a fixed input."""
        ids = (torch.arange(32, device=self.device) * 7 % self.config.vocab_size).view(2, 16)
        mine, theirs = self.student.model(ids).logits, self.plain(ids).logits
        if not bool(torch.isfinite(mine).all()):
            raise StoreError("logits are not finite")
        if not torch.equal(mine, theirs):
            raise StoreError("kdctl and transformers compute different logits from the same weights")
        return f"kdctl's and transformers' are equal to the bit on {ids.numel()} tokens"

    # --- with the teacher ---------------------------------------------------------------------------------------------

    def same_tokenizer(self) -> str:
        """Compare the tokenizer, the stop tokens and the vocabulary's size with the teacher's."""
        own = self.tokenizer
        check_vocabulary(own, self.config)
        theirs = tokens.open_tokenizer(self.teacher_folder)
        different = tokens.differences(own, theirs)
        rows, their_rows = self.config.vocab_size, read_config(self.teacher_folder).vocab_size
        if stop_ids(self.folder, own, rows) != stop_ids(self.teacher_folder, theirs, their_rows):
            different.append("stop tokens")
        if rows != their_rows:
            different.append("vocabulary size")
        if different:
            raise StoreError(f"not the teacher's: {', '.join(different)}")
        return f"the teacher's, with {len(own)} tokens"

    def same_teacher(self) -> str:
        """Compare the teacher with the one that the folder was made from."""
        try:
            return f"{self.teacher_folder} is the one that the folder was made from"
        except Unknown as reason:
            if self.teacher.asked:
                raise StoreError(str(reason)) from None
            raise

    def same_configuration(self) -> str:
        """Compare what the configuration says of the network with the teacher's, which no check of weights can see."""
        theirs = read_config(self.teacher_folder).to_dict()
        own = {key: value for key, value in self.config.to_dict().items() if key in theirs.keys() - OWN_KEYS}
        different = sorted(key for key, value in own.items() if value != theirs[key])
        if different:
            raise StoreError(f"config.json and the teacher's differ in {some(different)}")
        return f"{len(own)} settings of the network are the teacher's"

    def layer_errors(self) -> str:
        """Compute the error of each quantized layer again."""
        recorded = {error.name: error for error in self.report.layers}
        found = layer_errors(self.teacher_model.get_parameter, self.student.weights)
        if recorded.keys() != {error.name for error in found}:
            raise StoreError(f"{REPORT} lists other layers than are quantized")
        for error in found:
            _same(f"SQNR of {error.name}", error.sqnr_db, recorded[error.name].sqnr_db, CLOSE)
            _same(f"error of {error.name}", error.relative_error, recorded[error.name].relative_error, CLOSE)
        return f"SQNR of {len(found)} layers is what {REPORT} says"

    def divergence(self) -> str:
        """Measure the KL to the teacher again, on the yardstick that the folder was measured on."""
        _ = self.teacher_folder
        run = enclosing_run(self.folder)
        store = RolloutStore(run.heldout) if run else None
        if run is None or store is None or not store.manifest_path.is_file():
            raise Unknown("the held-out completions are not beside the folder")
        preset = read_record(run.preset, Preset)
        window = metrics.text_window(reach_of(self.config))
        found = metrics.yardstick_identity(preset.heldout.text_tokens, store.fingerprint(), self.report.teacher, window)
        if found != self.report.yardstick:
            raise Unknown(f"{run.heldout} is not the yardstick that the folder was measured on")
        yardstick = metrics.make_yardstick(self.teacher_model, store.read())
        kl = metrics.compare(self.student.model, yardstick, measures=[FORWARD_KL]).mean(FORWARD_KL)
        return _same("KL", kl, self.report.distribution.forward_kl.value, KL_CLOSE)


def _heldout(folder: Path) -> pa.Table:
    with naming(folder / HELDOUT):
        return pq.read_table(folder / HELDOUT)


def _same(what: str, found: float | None, recorded: float | None, tolerance: float) -> str:
    """Compare a number with its record. Raises StoreError if they differ by more than rounding."""
    if found == recorded:
        return f"{what} is {found if found is None else fixed(found, 6)}, equal to its record"
    if found is None or recorded is None or not abs(found - recorded) <= tolerance * max(abs(recorded), 1e-6):
        raise StoreError(f"{what} is {found!r}, and {REPORT} says {recorded!r}")
    return f"{what} is {fixed(found, 6)}, its record {fixed(recorded, 6)}: the same but for rounding on other hardware"


def _refill(name: str, packed: Tensor, stored: dict[str, Tensor]) -> None:
    """Raise StoreError if bits that fill up the last word of a row are set."""
    if not torch.equal(packed.cpu(), stored[name]):
        raise StoreError(f"{name} has bits set that belong to no code")
