"""How far the student is from the teacher: KL, top-1 agreement and perplexity, on rollouts and on plain text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl import stats
from kdctl.config.resolve import identity
from kdctl.model.batch import Batch, collate, predicting_states, split
from kdctl.model.context import Reach
from kdctl.model.head import Head, head_of, rows_at_once
from kdctl.run.documents import PerDocument
from kdctl.run.measures import PERPLEXITY, TEACHER_PERPLEXITY, TOKEN_MEASURES, Predictions, TokenMeasure
from kdctl.run.records import DistributionMetrics, Estimate, Rollout, TextMetrics

Progress = Callable[[int, int], None]
BATCH = 16
TEXT_WINDOW = 512


@dataclass(frozen=True)
class Yardstick:
    """Held-out rollouts in fixed batches, with the teacher's final hidden states at the predicting positions."""

    batches: list[Batch]
    states: list[Tensor]
    head: Head


@dataclass(frozen=True)
class Heads:
    """Output heads; the two of a student of ours are equal, those of a model made elsewhere need not be."""

    student: Head
    teacher: Head

    @property
    def chunk(self) -> int:
        """Tokens whose logits are in memory at once."""
        return self.teacher.chunk


def yardstick_identity(text_tokens: int, heldout: str, teacher: str, window: int = TEXT_WINDOW) -> str:
    """Hash everything that students are measured on: held-out completions, their writer and the plain text."""
    text = {"text_tokens": text_tokens} | ({} if window == TEXT_WINDOW else {"text_window": window})
    return identity("yardstick", text, {"heldout": heldout, "teacher": teacher})


def text_window(reach: Reach) -> int:
    """Return the tokens of the longest document of plain text that a network is given."""
    return TEXT_WINDOW if reach.tokens is None else min(TEXT_WINDOW, reach.tokens)


def make_yardstick(
    teacher: PreTrainedModel, rollouts: Sequence[Rollout], progress: Progress | None = None
) -> Yardstick:
    """Run the teacher over rollouts once, in the order of ``by_length``."""
    return _read(teacher, by_length(rollouts), progress)


def by_length(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Order rollouts as a yardstick has them, so that a batch holds sequences of like lengths."""
    return sorted(rollouts, key=lambda r: len(r.prompt_ids) + len(r.completion_ids))


def prompt_ids(rollouts: Sequence[Rollout]) -> list[str]:
    """List the prompts of rollouts in the order of ``by_length``, in which documents are measured."""
    return [rollout.prompt_id for rollout in by_length(rollouts)]


def _read(teacher: PreTrainedModel, rollouts: Sequence[Rollout], progress: Progress | None = None) -> Yardstick:
    """Run the teacher over rollouts in the order given."""
    batches = [collate(part) for part in split(rollouts, BATCH)]
    states = []
    for done, batch in enumerate(batches):
        states.append(predicting_states(teacher, batch))
        if progress is not None:
            progress(done + 1, len(batches))
    return Yardstick(batches, states, head_of(teacher))


def compare(
    student: PreTrainedModel,
    yardstick: Yardstick,
    progress: Progress | None = None,
    measures: Sequence[TokenMeasure] | None = None,
) -> PerDocument:
    """Measure the student against the teacher on every document of the yardstick, by all measures or those named."""
    parts, heads = [], Heads(head_of(student), yardstick.head)
    for done, (batch, states) in enumerate(zip(yardstick.batches, yardstick.states, strict=True)):
        hidden = predicting_states(student, batch)
        parts.append(_per_document(hidden, states, batch.to(student.device), heads, measures))
        if progress is not None:
            progress(done + 1, len(yardstick.batches))
    return _joined(parts)


def compare_teacher(yardstick: Yardstick, measures: Sequence[TokenMeasure] | None = None) -> PerDocument:
    """Measure the teacher against itself: all divergences are zero, the likelihoods are its own."""
    pairs, heads = zip(yardstick.batches, yardstick.states, strict=True), Heads(yardstick.head, yardstick.head)
    return _joined([_per_document(own, None, batch.to(own.device), heads, measures) for batch, own in pairs])


@torch.inference_mode()
def _per_document(
    student: Tensor, teacher: Tensor | None, batch: Batch, heads: Heads, measures: Sequence[TokenMeasure] | None
) -> PerDocument:
    """Sum over the tokens of each document of a batch; without a teacher's states the student is the teacher."""
    chosen = list(TOKEN_MEASURES.values() if measures is None else measures)
    hidden, targets = student.split(heads.chunk), batch.targets().split(heads.chunk)
    wanted = [None] * len(hidden) if teacher is None else teacher.split(heads.chunk)
    chunks = [_predictions(*part, heads) for part in zip(hidden, wanted, targets, strict=True)]
    values = torch.cat([_values(at, chosen) for at in chain.from_iterable(chunks)], -1).double()  # (measures, N)
    counts = torch.tensor(batch.counts)
    document = torch.repeat_interleave(torch.arange(len(counts)), counts).to(values.device)
    sums = values.new_zeros(len(values), len(counts)).index_add_(1, document, values)
    columns = (one.column for one in chosen)
    return PerDocument(counts.double().numpy(), dict(zip(columns, sums.cpu().numpy(), strict=True)))


def _predictions(student: Tensor, teacher: Tensor | None, targets: Tensor, heads: Heads) -> Iterator[Predictions]:
    """Multiply (N, H) hidden states to logits at once, and hand out few rows at a time: all in float32 is large.

    What no measure reads is not computed.
    """
    rows = rows_at_once(student, len(student))
    q = cache(lambda: heads.student(student).split(rows))
    p = None if teacher is None else cache(lambda: heads.teacher(teacher).split(rows))
    for index, target in enumerate(targets.split(rows)):
        yield Predictions(partial(_logs, q, index), None if p is None else partial(_logs, p, index), target)


def _logs(logits: Callable[[], Sequence[Tensor]], index: int) -> Tensor:
    return logits()[index].float().log_softmax(-1)


def _values(at: Predictions, measures: Sequence[TokenMeasure]) -> Tensor:
    return torch.stack([one.per_token(at) for one in measures])


def _joined(parts: Sequence[PerDocument]) -> PerDocument:
    tokens = np.concatenate([part.tokens for part in parts])
    return PerDocument(tokens, {key: np.concatenate([part.sums[key] for part in parts]) for key in parts[0].sums})


def estimate(per_document: PerDocument, measure: TokenMeasure) -> Estimate:
    """Return a measure of a model with its interval over documents."""
    found = stats.ratio(per_document[measure], per_document.tokens)
    return stats.exponential(found) if measure.exponent else found


def summarize(per_document: PerDocument) -> DistributionMetrics:
    """Turn per-document sums into per-token estimates with intervals over documents."""
    known = [one for one in TOKEN_MEASURES.values() if per_document.has(one) and one.of != "teacher"]
    found: dict[str, object] = {one.name: estimate(per_document, one) for one in known}
    tokens = per_document.tokens
    found["teacher_perplexity"] = per_document.value(TEACHER_PERPLEXITY)
    return DistributionMetrics.model_validate(found | {"documents": len(tokens), "tokens": int(tokens.sum())})


def text_documents(tokenizer: PreTrainedTokenizerBase, tokens: int, window: int = TEXT_WINDOW) -> list[list[int]]:
    """Cut Python's help topics into documents of at most ``window`` tokens until ``tokens`` are reached."""
    documents: list[list[int]] = []
    for name in sorted(topics):
        ids: list[int] = tokenizer(topics[name], add_special_tokens=False)["input_ids"]  # pyright: ignore
        ids = ids[: min(window, tokens - sum(map(len, documents)))]
        if len(ids) < 2:
            break
        documents.append(ids)
    return documents


def text_yardstick(teacher: PreTrainedModel, documents: Sequence[Sequence[int]]) -> Yardstick:
    """Run the teacher over plain text once, in the batches of ``text_perplexity``."""
    return _read(teacher, [text_rollout(ids) for ids in documents])


def text_perplexity(model: PreTrainedModel, documents: Sequence[Sequence[int]]) -> TextMetrics:
    """Measure perplexity on documents of tokens, each from its second token on."""
    return text_metrics(compare_teacher(text_yardstick(model, documents), [PERPLEXITY]))


def text_metrics(per_document: PerDocument) -> TextMetrics:
    """Sum up what was measured on plain text."""
    tokens, perplexity = per_document.tokens, estimate(per_document, PERPLEXITY)
    return TextMetrics(perplexity=perplexity, tokens=int(tokens.sum()), documents=len(tokens))


def text_rollout(ids: Sequence[int]) -> Rollout:
    """Present plain text as a completion of its own first token."""
    return Rollout("", 0, 0, list(ids[:1]), list(ids[1:]), None, "length", 0, 0, "text")
