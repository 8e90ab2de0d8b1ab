"""How far the student is from the teacher: KL, top-1 agreement and perplexity, on rollouts and on plain text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl import stats
from kdctl.config.resolve import identity
from kdctl.model.batch import Batch, collate, predicting_states, split
from kdctl.model.head import Head, head_of, rows_at_once, token_chunk
from kdctl.run.records import DistributionMetrics, Rollout, TextMetrics

Array = NDArray[np.float64]
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
        return token_chunk(self.teacher.weight.shape[0])


@dataclass(frozen=True)
class PerDocument:
    """Sums over the completion tokens of each document, (documents,) float64, in nats and counts."""

    tokens: Array
    forward_kl: Array
    reverse_kl: Array
    agree: Array
    nll: Array
    teacher_nll: Array


def yardstick_identity(text_tokens: int, heldout: str, teacher: str) -> str:
    """Hash everything that students are measured on: held-out completions, their writer and the plain text."""
    return identity("yardstick", {"text_tokens": text_tokens}, {"heldout": heldout, "teacher": teacher})


def make_yardstick(
    teacher: PreTrainedModel, rollouts: Sequence[Rollout], progress: Progress | None = None
) -> Yardstick:
    """Run the teacher over rollouts once, in the order of ``by_length``."""
    return _read(teacher, by_length(rollouts), progress)


def by_length(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Order rollouts as a yardstick has them, so that a batch holds sequences of like lengths."""
    return sorted(rollouts, key=lambda r: len(r.prompt_ids) + len(r.completion_ids))


def _read(teacher: PreTrainedModel, rollouts: Sequence[Rollout], progress: Progress | None = None) -> Yardstick:
    """Run the teacher over rollouts in the order given."""
    batches = [collate(part) for part in split(rollouts, BATCH)]
    states = []
    for done, batch in enumerate(batches):
        states.append(predicting_states(teacher, batch))
        if progress is not None:
            progress(done + 1, len(batches))
    return Yardstick(batches, states, head_of(teacher))


def compare(student: PreTrainedModel, yardstick: Yardstick, progress: Progress | None = None) -> PerDocument:
    """Measure the student against the teacher on every document of the yardstick."""
    parts, heads = [], Heads(head_of(student), yardstick.head)
    for done, (batch, states) in enumerate(zip(yardstick.batches, yardstick.states, strict=True)):
        hidden = predicting_states(student, batch)
        parts.append(_per_document(hidden, states, batch.to(student.device), heads))
        if progress is not None:
            progress(done + 1, len(yardstick.batches))
    return _joined(parts)


@torch.inference_mode()
def _per_document(student: Tensor, teacher: Tensor, batch: Batch, heads: Heads) -> PerDocument:
    hidden, wanted, targets = (tensor.split(heads.chunk) for tensor in (student, teacher, batch.targets()))
    parts = [_columns(*part, heads) for part in zip(hidden, wanted, targets, strict=True)]
    values = torch.cat(list(chain.from_iterable(parts)), -1).double()  # (5, N)
    counts = torch.tensor(batch.counts)
    document = torch.repeat_interleave(torch.arange(len(counts)), counts).to(values.device)
    sums = values.new_zeros(len(values), len(counts)).index_add_(1, document, values)
    return PerDocument(counts.double().numpy(), *sums.cpu().numpy())


def _columns(student: Tensor, teacher: Tensor, targets: Tensor, heads: Heads) -> Iterator[Tensor]:
    """Multiply (N, H) hidden states to logits at once, and measure few rows at a time: all in float32 is large."""
    rows = rows_at_once(student, len(student))
    logits = heads.student(student).split(rows), heads.teacher(teacher).split(rows)
    for q, p, target in zip(*logits, targets.split(rows), strict=True):
        yield _per_token(q.float(), p.float(), target)


def _per_token(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Return forward KL, reverse KL, agreement and both negative log-likelihoods of each position, (5, N)."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    difference = log_p - log_q
    at = targets.unsqueeze(-1)
    return torch.stack(
        [
            (log_p.exp() * difference).sum(-1),
            -(log_q.exp() * difference).sum(-1),
            (log_p.argmax(-1) == log_q.argmax(-1)).float(),
            -log_q.gather(-1, at).squeeze(-1),
            -log_p.gather(-1, at).squeeze(-1),
        ]
    )


def summarize(per_document: PerDocument) -> DistributionMetrics:
    """Turn per-document sums into per-token estimates with intervals over documents."""
    tokens = per_document.tokens
    return DistributionMetrics(
        forward_kl=stats.ratio(per_document.forward_kl, tokens),
        reverse_kl=stats.ratio(per_document.reverse_kl, tokens),
        top1_agreement=stats.ratio(per_document.agree, tokens),
        perplexity=stats.exponential(stats.ratio(per_document.nll, tokens)),
        teacher_perplexity=float(np.exp(per_document.teacher_nll.sum() / tokens.sum())),
        documents=len(tokens),
        tokens=int(tokens.sum()),
    )


def compare_teacher(yardstick: Yardstick) -> PerDocument:
    """Measure the teacher against itself: all divergences are zero, the likelihoods are its own."""
    pairs, heads = zip(yardstick.batches, yardstick.states, strict=True), Heads(yardstick.head, yardstick.head)
    return _joined([_per_document(states, states, batch.to(states.device), heads) for batch, states in pairs])


def _joined(parts: Sequence[PerDocument]) -> PerDocument:
    return PerDocument(*(np.concatenate([vars(part)[f.name] for part in parts]) for f in fields(PerDocument)))


def from_table(table: pa.Table) -> PerDocument:
    """Undo ``as_table``."""
    return PerDocument(*(table[f.name].to_numpy() for f in fields(PerDocument)))


def as_table(per_document: PerDocument, prompt_ids: Sequence[str] = ()) -> pa.Table:
    """Lay out per-document sums as a table, one row a document, with the documents' prompts where they are given."""
    return pa.table({**({"prompt_id": prompt_ids} if prompt_ids else {}), **vars(per_document)})


def text_documents(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[list[int]]:
    """Cut Python's help topics into documents of at most 512 tokens until ``tokens`` are reached."""
    documents: list[list[int]] = []
    for name in sorted(topics):
        ids: list[int] = tokenizer(topics[name], add_special_tokens=False)["input_ids"]  # pyright: ignore
        ids = ids[: min(TEXT_WINDOW, tokens - sum(map(len, documents)))]
        if len(ids) < 2:
            break
        documents.append(ids)
    return documents


def text_yardstick(teacher: PreTrainedModel, documents: Sequence[Sequence[int]]) -> Yardstick:
    """Run the teacher over plain text once, in the batches of ``text_perplexity``."""
    return _read(teacher, [_as_rollout(ids) for ids in documents])


def text_perplexity(model: PreTrainedModel, documents: Sequence[Sequence[int]]) -> TextMetrics:
    """Measure perplexity on documents of tokens, each from its second token on."""
    return text_metrics(compare_teacher(text_yardstick(model, documents)))


def text_metrics(per_document: PerDocument) -> TextMetrics:
    """Sum up what was measured on plain text."""
    tokens = per_document.tokens
    perplexity = stats.exponential(stats.ratio(per_document.nll, tokens))
    return TextMetrics(perplexity=perplexity, tokens=int(tokens.sum()), documents=len(tokens))


def _as_rollout(ids: Sequence[int]) -> Rollout:
    """Present plain text as a completion of its own first token."""
    return Rollout("", 0, 0, list(ids[:1]), list(ids[1:]), None, "length", 0, 0, "text")
