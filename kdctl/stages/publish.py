"""Writes student folders: the model card with them, and the gate before them."""

from pathlib import Path

import torch
from huggingface_hub import metadata_load
from yaml import YAMLError

from kdctl.formats.inspection import Teacher as Original
from kdctl.formats.model_card import Origin, Training, model_card
from kdctl.formats.student import Student, save_student
from kdctl.formats.verify import accept
from kdctl.model.reference import HUB_ID
from kdctl.model.teacher import Teacher
from kdctl.run.documents import PerDocument, as_table
from kdctl.run.records import QuantizeReport
from kdctl.stages.context import Context
from kdctl.system.memory import give_back


def write_student(
    teacher: Teacher,
    folder: Path,
    student: Student,
    report: QuantizeReport,
    per_document: PerDocument,
    training: Training | None = None,
) -> None:
    """Write a student folder beside its place, where ``accept_student`` finds it.

    training: how it was trained, None for a PTQ student.
    """
    origin = origin_of(teacher)
    table = as_table(per_document)
    save_student(
        _pending(folder), student, teacher.tokenizer(), report, table, lambda sized: model_card(sized, origin, training)
    )


def accept_student(context: Context, teacher: Teacher, folder: Path) -> None:
    """Verify a folder that ``write_student`` wrote and move it to its place. Raises StoreError if it does not verify.

    The model is loaded twice more for that, so the caller should hold no student any longer. It is loaded to the CPU:
    what is compared is the same everywhere, and an accelerator that holds the teacher may have no room left.
    """
    give_back()
    with context.reporter.task(f"verifying {folder.name}"):
        original = Original(teacher.folder(), teacher.dtype, teacher.fingerprint())
        accept(_pending(folder), folder, original, torch.device("cpu"))


def _pending(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.new")


def origin_of(teacher: Teacher) -> Origin:
    """Say where the teacher came from."""
    reference = teacher.settings.model
    return Origin(reference, reference if is_hub_id(reference) else None, license_of(teacher.folder()))


def is_hub_id(reference: str) -> bool:
    """Tell whether a reference names a model on the Hub, not something on this disk."""
    return "/" in reference and bool(HUB_ID.match(reference)) and not Path(reference).exists()


def license_of(folder: Path) -> str | None:
    """Return the license that a model folder's card states, if it has one that can be read."""
    card = folder / "README.md"
    try:
        found = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (ValueError, YAMLError):
        return None
    return found if isinstance(found, str) else None
