"""What training on a mixture was like, source by source."""

from collections.abc import Iterator, Sequence

from kdctl.report.columns import Results
from kdctl.report.study import Model
from kdctl.report.study_reader import LOSSES
from kdctl.report.tables import Block, Cell, Column, Table

TOKENS = "train/completion_tokens/"
PARTS = 4
"""The first and the last of as many parts of training are compared."""
Line = dict[str, float]


def sources(results: Results) -> Table:
    """List tokens, length and loss of each source of prompts, for variants that were trained on a mixture."""
    rows = [row for one in results.rows for model in one.models for row in _rows(model)]
    columns = (
        Column("model", "model"),
        Column("source", "source"),
        Column("share", "of the sequences, %", "percent"),
        Column("tokens", "completion tokens", "number"),
        Column("length", "tokens a completion", "ratio"),
        Column("loss_first", "loss in the first quarter", "kl"),
        Column("loss_last", "in the last", "kl"),
    )
    note = (
        "Loss in nats a token, by the variant's own divergence, on the sequences of that quarter: each has prompts of "
        "its own, and where the student writes, completions too."
    )
    return Table("sources", "Sources of prompts", columns, (Block("", tuple(rows)),), (note,))


def _rows(model: Model) -> Iterator[tuple[Cell, ...]]:
    curve = model.curve
    names = sorted({key.removeprefix(TOKENS) for line in curve for key in line if key.startswith(TOKENS)})
    quarter = max(1, len(curve) // PARTS)
    for name in names:
        share = sum(line.get(f"rollout/share/{name}", 0.0) for line in curve) / len(curve)
        tokens = sum(line.get(f"{TOKENS}{name}", 0.0) for line in curve)
        length = _mean(curve, f"rollout/mean_tokens/{name}", f"rollout/share/{name}")
        losses = [_loss(part, name) for part in (curve[:quarter], curve[-quarter:])]
        yield tuple(map(Cell, (model.name, name, share, int(tokens), length, *losses)))


def _loss(lines: Sequence[Line], name: str) -> float | None:
    """Average the loss on a source's tokens."""
    found = (_mean(lines, f"{loss}/{name}", f"{TOKENS}{name}") for loss in LOSSES)
    return next((value for value in found if value is not None), None)


def _mean(lines: Sequence[Line], name: str, weight: str) -> float | None:
    """Average what some lines hold, by another of their figures; None where no line has it."""
    pairs = [(line[name], line[weight]) for line in lines if name in line]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
