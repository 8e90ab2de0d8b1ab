"""Publishes student folders: the model card with them, and the gate before them."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import metadata_load
from yaml import YAMLError

from kdctl.formats.inspection import Teacher as Original
from kdctl.formats.model_card import Origin, Training, model_card
from kdctl.formats.student import Student, save_student
from kdctl.formats.verify import accept
from kdctl.model.reference import HUB_ID
from kdctl.model.teacher import Teacher
from kdctl.run.documents import PerDocument, as_table
from kdctl.run.files import scratch_folder
from kdctl.run.records import QuantizeReport
from kdctl.stages.context import Context


@dataclass(frozen=True)
class Described:
    """What a folder says of its student. training: how it was trained, None for a PTQ student."""

    report: QuantizeReport
    per_document: PerDocument
    training: Training | None = None


def publish_student(context: Context, teacher: Teacher, folder: Path, student: Student, said: Described) -> None:
    """Write a student folder and give it its place once its files prove to hold the student in memory.

    Raises StoreError if they do not.
    """
    card = partial(model_card, origin=origin_of(teacher), training=said.training)
    with scratch_folder(folder) as pending:
        save_student(pending, student, teacher.tokenizer(), said.report, as_table(said.per_document), card)
        with context.reporter.task(f"verifying {folder.name}"):
            accept(pending, folder, student, Original(teacher.folder(), teacher.dtype, teacher.fingerprint()))


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
