"""Proves a student folder: integrity, tensors, numbers, and three loaders that agree to the bit.

What can be proven from the folder alone must be; what needs the teacher is "unknown", with the reason, where there is
none. ``accept`` is the gate that every new folder passes before it takes its place, with its student still in memory.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from safetensors import SafetensorError

from kdctl.base.errors import KdctlError, StoreError
from kdctl.base.progress import Reporter, Silent
from kdctl.config.preset import Preset
from kdctl.formats.inspection import Inspection, Teacher, Unknown
from kdctl.formats.proof import prove
from kdctl.formats.records import Check, VerifyReport
from kdctl.formats.student import Student
from kdctl.model.load import torch_dtype
from kdctl.model.reference import model_folder
from kdctl.run.files import replace_folder
from kdctl.run.paths import enclosing_run
from kdctl.run.record_files import read_record

Kinds = tuple[type[Exception], ...]
BROKEN: Kinds = (
    *(KdctlError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    *(SafetensorError, pa.ArrowException),
)
"""What readers of a damaged folder raise."""
WRONG = tuple(kind for kind in BROKEN if kind is not OSError)
"""The same without what a disk raises."""


def find_teacher(folder: Path, reference: str | None = None) -> Teacher:
    """Find the teacher that the user names, else the one of the run folder around a student folder.

    Raises ModelError if the named one is not there.
    """
    run = enclosing_run(folder)
    preset = read_record(run.preset, Preset) if run else None
    dtype = torch_dtype(preset.teacher.dtype) if preset else torch.bfloat16
    offline = bool(preset and preset.runtime.offline)
    if reference is not None:
        return Teacher(model_folder(reference, dtype, offline=offline), dtype, asked=True)
    if preset is None:
        return Teacher(None)
    teacher = preset.teacher
    try:
        return Teacher(model_folder(teacher.model, dtype, teacher.revision, offline), dtype)
    except KdctlError as error:
        return Teacher(None, dtype, reason=str(error))


def verify(folder: Path, teacher: Teacher, device: torch.device, reporter: Reporter | None = None) -> VerifyReport:
    """Make every check. Raises StoreError if the folder is no student folder at all."""
    found, tell = Inspection(folder, teacher, device), reporter or Silent()

    def told(name: str, look: Callable[[], str], needs_teacher: bool = False) -> Check:
        with tell.task(f"checking {name}"):
            return check(name, look, needs_teacher)

    stored = [
        told("integrity", found.integrity),
        told("record", found.record),
        told("tensors", found.shapes),
        told("grid", found.numbers),
        told("loaders", found.loaders),
        told("logits", found.logits),
        told("tokenizer", found.same_tokenizer, needs_teacher=True),
    ]
    measured = [
        told("teacher", found.same_teacher, needs_teacher=True),
        told("configuration", found.same_configuration, needs_teacher=True),
        told("error of each layer", found.layer_errors, needs_teacher=True),
        told("KL to the teacher", found.divergence, needs_teacher=True),
    ]
    return reported(folder, [*stored, *measured])


def accept(pending: Path, folder: Path, student: Student, teacher: Teacher) -> None:
    """Give a new folder its place if what it stores is the student in memory, and its records and tokenizer agree.

    Raises StoreError if it does not; then it is kept as ``<name>.failed`` and what was in its place stays. An OSError
    says nothing about what was written and is raised as it is.
    """
    found, sure = Inspection(pending, teacher, torch.device("cpu")), partial(check, broken=WRONG)
    checks = [
        sure("integrity", found.integrity),
        sure("record", found.record),
        sure("tensors", lambda: prove(pending, student)),
        sure("tokenizer", found.same_tokenizer, needs_teacher=True),
    ]
    report = reported(folder, checks)
    if report.passed:
        replace_folder(pending, folder)
        return
    failed = folder.with_name(f"{folder.name}.failed")
    replace_folder(pending, failed)
    reasons = "; ".join(f"{each.name}: {each.detail}" for each in report.checks if not each.acceptable)
    raise StoreError(
        f"the new student folder does not verify and is not accepted ({reasons}); it is kept as {failed} for a look, "
        "and its numbers are not to be used"
    )


def reported(folder: Path, checks: Sequence[Check]) -> VerifyReport:
    """Say whether all checks of a folder are acceptable."""
    return VerifyReport(folder=str(folder), passed=all(each.acceptable for each in checks), checks=tuple(checks))


def check(name: str, look: Callable[[], str], needs_teacher: bool = False, broken: Kinds = BROKEN) -> Check:
    """Make one check: it returns what it found, or raises why it failed or is unknown.

    broken: the exceptions that mean that it failed; others are raised.
    """
    try:
        return Check(name=name, status="passed", detail=look(), needs_teacher=needs_teacher)
    except Unknown as reason:
        return Check(name=name, status="unknown", detail=str(reason), needs_teacher=needs_teacher)
    except torch.OutOfMemoryError:
        raise  # says nothing about the folder
    except broken as error:
        text = str(error) if isinstance(error, KdctlError) else f"{type(error).__name__}: {error}"
        return Check(name=name, status="failed", detail=" ".join(text.split())[:400], needs_teacher=needs_teacher)
