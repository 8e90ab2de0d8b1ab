"""Teacher and student of a run in memory while something is trained or measured: whole, or by rows in each process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from kdctl.distill.fsdp import check_rows, divided_student, free_gathered, load_divided, without_layers
from kdctl.formats.student import Student, load_student, read_rows
from kdctl.quant.apply import share_frozen
from kdctl.stages.context import Context
from kdctl.stages.yardstick import Measuring
from kdctl.system.memory import give_back


@contextmanager
def opened(context: Context, measuring: Measuring) -> Iterator[tuple[Measuring, Student]]:
    """Hold the PTQ student beside the teacher, and what measures by that teacher.

    Where models are divided each process reads its rows and no model is whole; every process must then do the same
    passes. After the block the teacher is forgotten.
    """
    if not context.ranks.sharded:
        student = load_student(context.paths.student, measuring.teacher.device)
        share_frozen(student.model, measuring.teacher.load(), student.weights)
        yield measuring, student
        return
    measuring.teacher.forget()
    try:
        yield replace(measuring), _divided(context, measuring)
    finally:
        measuring.teacher.forget()


def _divided(context: Context, measuring: Measuring) -> Student:
    """Divide teacher and student; the teacher is what ``load`` returns from now on."""
    teacher, ranks = measuring.teacher, context.ranks
    teacher.stop_ids()
    found = ranks.alike(lambda: read_rows(context.paths.student, teacher.device, ranks.span))
    teacher.hold(load_divided(teacher.folder(), teacher.dtype, teacher.device, found.weights.keys(), ranks))
    model = divided_student(teacher.load(), found.config, found.weights, ranks)
    model.generation_config = found.generation or model.generation_config
    give_back()
    return Student(model, found.weights)


def closed(context: Context, student: Student) -> Student:
    """Return what is to be written of a student: itself, or, where it is divided, without the rows of Q(W).

    Raises TrainingError unless these rows are those of its codes.
    """
    if not context.ranks.sharded:
        return student
    free_gathered(student.model)
    check_rows(student.model, student.weights, context.ranks)
    return Student(without_layers(student.model, student.model.config, student.weights), student.weights)
