"""Log-likelihoods of answers for lm-eval, from a live model that reads what answers have in common once.

lm-eval's own ``HFLM`` reads a question again with each of its choices and computes logits at every position. Here the
tokens with which the answers to one document begin are read once into a cache, each answer goes on from there, and
logits exist only where a token is scored. Texts become the same tokens as in ``HFLM``.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import NoReturn, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from kdctl.base.errors import DataError, ModelError
from kdctl.model.attention import Layout, forward
from kdctl.model.context import UNLIMITED, Reach, reach_of
from kdctl.model.head import check_head, head_of, rows_at_once

T = TypeVar("T")
Result = tuple[float, bool]
CHUNK = 256
"""Positions whose logits are multiplied at once."""
PADDING = 48
"""Padded positions that cost about as much as another pass through a small model on a CPU."""
PACKED = 2**14
"""Tokens of texts that are laid end to end in one pass."""


@dataclass(frozen=True)
class Answer:
    """A request in tokens, cut to what the model can read; the last ``scored`` ones are judged.

    index: the request's place in lm-eval's list. document: what the request is about.
    """

    index: int
    document: tuple[str | None, int | None]
    tokens: list[int]
    scored: int

    @property
    def inputs(self) -> list[int]:
        """What the model reads: each token predicts the next."""
        return self.tokens[:-1]


@dataclass(frozen=True)
class Question:
    """Answers whose inputs begin with the same tokens."""

    answers: list[Answer]
    prefix: list[int]


@dataclass(frozen=True)
class Ending:
    """What an answer's inputs have after the beginning they share with others of their question, maybe nothing.

    question: the place of the question in its batch.
    """

    question: int
    answer: Answer
    tokens: list[int]


@dataclass(frozen=True)
class Beginning:
    """The common beginnings of a batch of questions: final hidden states (B, T, H), mask (B, T), and a cache."""

    states: Tensor
    mask: Tensor
    cache: DynamicCache | None


class Encoder:
    """Turns requests into tokens as lm-eval's ``HFLM`` does.

    max_tokens: inputs that the model can read; longer contexts lose their beginning. reach: inputs that it computes the
    same in any batch. Raises ModelError for a tokenizer without a token that could stand for an empty context.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, reach: Reach = UNLIMITED):
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if not isinstance(first, int):
            raise ModelError("the tokenizer has neither a bos nor an eos token to put before a text without context")
        self.tokenizer = tokenizer
        self.max_tokens, self.reach = max_tokens, reach
        self.first = first
        self.first_text = str(tokenizer.decode(first))

    def answer(self, index: int, request: Instance) -> Answer:
        """Encode one request. Raises DataError where context or choice has no tokens, or a choice too many to read."""
        context, continuation = self._pair(*request.args)
        if not context or not 0 < len(continuation) <= self.max_tokens:
            raise DataError(
                f"task {request.task_name!r}, document {request.doc_id}: a context of {len(context)} tokens and a "
                f"choice of {len(continuation)}; only choices of 1 to {self.max_tokens} tokens after a context of at "
                "least one can be scored; take the task out of eval.tasks"
            )
        tokens = (context + continuation)[-(self.max_tokens + 1) :]
        answer = Answer(index, (request.task_name, request.doc_id), tokens, len(continuation))
        return self._reached(answer, "lower eval.num_fewshot or ")

    def windows(self, index: int, request: Instance) -> Iterator[Answer]:
        """Cut a text as lm-eval does into windows that judge each of its tokens once; an empty text has none.

        Raises DataError for a window that the network does not reach.
        """
        (text,) = request.args
        found = get_rolling_token_windows(self.encode(text), self.first, self.max_tokens, context_len=1)
        for before, judged in map(make_disjoint_window, found):
            yield self._reached(Answer(index, (request.task_name, request.doc_id), before + judged, len(judged)))

    def _reached(self, answer: Answer, way: str = "") -> Answer:
        """Refuse what the network would compute otherwise in other company. way: what may help."""
        if not self.reach.has(len(answer.inputs)):
            task, document = answer.document
            raise DataError(
                f"task {task!r}, document {document}: {len(answer.inputs)} tokens, and {self.reach.why}; {way}take the "
                "task out of eval.tasks"
            )
        return answer

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Split at the end of the context; spaces that end it belong to the continuation, where tokens begin."""
        if not context:
            tokens = self.tokenizer.encode(continuation, add_special_tokens=False)
            return ([self.first], tokens) if tokens[:1] != [self.first] else (tokens[:1], tokens[1:])
        before = self.encode(context.rstrip())
        return before, self.encode(context + continuation)[len(before) :]

    def encode(self, text: str) -> list[int]:
        """Encode with the tokenizer's special tokens, unless the text brings its own beginning."""
        return self.tokenizer.encode(text, add_special_tokens=not text.startswith(self.first_text))


class LikelihoodModel(LM):
    """A live model as lm-eval sees it, for requests that score continuations.

    batch_size: sequences in one forward pass. Raises ModelError where logits are more than lm_head(hidden).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        super().__init__()
        check_head(model)
        self.model = model
        self.head = head_of(model)
        self.batch_size = batch_size
        self.encoder = Encoder(tokenizer, resolve_max_length(model.config, tokenizer), reach_of(model.config))
        self.known: Mapping[tuple[int, int], float] = {}
        """Log-likelihoods that need no asking, by document and number of the choice."""

    def loglikelihood(self, requests: list[Instance]) -> list[Result]:
        """Return each request's log-likelihood in nats, and whether greedy decoding would write its continuation."""
        keys = [(request.doc_id or 0, request.idx) for request in requests]
        results: dict[int, Result] = {i: (self.known[key], False) for i, key in enumerate(keys) if key in self.known}
        for index in results:
            self.cache_hook.add_partial("loglikelihood", requests[index].args, results[index])
        asked = [(index, request) for index, request in enumerate(requests) if index not in results]
        answers = [self.encoder.answer(index, request) for index, request in asked]
        found = questions(answers, self.batch_size if _resumable(self.model.config) else 1)
        for batch in batches(found, self.batch_size, lambda question: len(question.prefix)):
            for answer, result in self._judged(batch):
                results[answer.index] = result
                self.cache_hook.add_partial("loglikelihood", requests[answer.index].args, result)
        return [results[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return each text's log-likelihood in nats; one longer than the context is read in lm-eval's windows."""
        windows = [window for index, request in enumerate(requests) for window in self.encoder.windows(index, request)]
        totals, done = [0.0] * len(requests), 0
        for pack in packs(windows, self.batch_size):
            for window, (value, _) in zip(pack, self._read(pack), strict=True):
                totals[window.index] += value
            self._offer_texts(requests, totals, done, pack[-1].index)
            done = pack[-1].index
        self._offer_texts(requests, totals, done, len(requests))
        return totals

    def _offer_texts(self, requests: Sequence[Instance], totals: Sequence[float], first: int, stop: int) -> None:
        for request, total in zip(requests[first:stop], totals[first:stop], strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)

    @torch.inference_mode()
    def _read(self, windows: Sequence[Answer]) -> list[Result]:
        """Judge windows that lie end to end."""
        lengths = [len(window.inputs) for window in windows]
        ids = torch.tensor([*chain.from_iterable(window.inputs for window in windows)], device=self.model.device)
        places = torch.cat([torch.arange(length, device=self.model.device) for length in lengths])
        parts = forward(self.model, ids, places, Layout(lengths)).split(lengths)
        predicting = [part[-window.scored :] for part, window in zip(parts, windows, strict=True)]
        return self._results(windows, torch.cat(predicting))

    def generate_until(self, requests: list[Instance]) -> NoReturn:
        """Refuse tasks that generate."""
        raise _unscorable(requests)

    @torch.inference_mode()
    def _judged(self, batch: Sequence[Question]) -> Iterator[tuple[Answer, Result]]:
        """Read the questions' common beginnings, then what follows in each answer."""
        endings = [
            Ending(place, answer, answer.inputs[len(question.prefix) :])
            for place, question in enumerate(batch)
            for answer in question.answers
        ]
        ids, mask = _padded([question.prefix for question in batch], "left", self.model.device)
        cache = DynamicCache(config=self.model.config) if any(ending.tokens for ending in endings) else None
        beginning = Beginning(cached_hidden(self.model, ids, mask, cache), mask, cache)
        for few in batches(endings, self.batch_size, lambda ending: len(ending.tokens)):
            answers = [ending.answer for ending in few]
            yield from zip(answers, self._results(answers, self._predicting(beginning, few)), strict=True)

    def _predicting(self, beginning: Beginning, endings: Sequence[Ending]) -> Tensor:
        """Return the final hidden states that predict scored tokens, (N, H), answer after answer."""
        places = torch.tensor([ending.question for ending in endings], device=self.model.device)
        most = max(ending.answer.scored for ending in endings)
        hidden = beginning.states[:, -most:][places]  # scored tokens that answers share are predicted here
        start = hidden.shape[1]
        if beginning.cache is not None and endings[0].tokens:
            ids, mask = _padded([ending.tokens for ending in endings], "right", self.model.device)
            attended = torch.cat([beginning.mask[places], mask], -1)
            after = cached_hidden(self.model, ids, attended, _selected(beginning.cache, places))
            hidden = torch.cat([hidden, after], 1)
        ends = [start + len(ending.tokens) for ending in endings]
        scored = [ending.answer.scored for ending in endings]
        return torch.cat([row[end - n : end] for row, end, n in zip(hidden, ends, scored, strict=True)])

    def _results(self, answers: Sequence[Answer], hidden: Tensor) -> list[Result]:
        """Score tokens from the states that predict them, in float32: in bf16 choices would tie."""
        targets = torch.tensor([token for a in answers for token in a.tokens[-a.scored :]], device=hidden.device)
        rows = rows_at_once(hidden, CHUNK)
        logprobs, greedy = [], []
        for states, tokens in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            for logits, wanted in zip(self.head(states).split(rows), tokens.split(rows), strict=True):
                scores = logits.float().log_softmax(-1)
                logprobs.append(scores.gather(-1, wanted.unsqueeze(-1)).squeeze(-1))
                greedy.append(scores.argmax(-1) == wanted)
        lengths = [answer.scored for answer in answers]
        columns = torch.cat(logprobs).double().split(lengths), torch.cat(greedy).split(lengths)
        return [(float(value.sum()), bool(same.all())) for value, same in zip(*columns, strict=True)]


def questions(answers: Iterable[Answer], most: int) -> list[Question]:
    """Put answers about one document that begin with the same token together, at most so many."""
    together: dict[tuple[object, int], list[Answer]] = defaultdict(list)
    for answer in answers:
        together[answer.document, answer.tokens[0]].append(answer)
    groups = [group[i : i + most] for group in together.values() for i in range(0, len(group), most)]
    return [Question(group, _common([answer.inputs for answer in group])) for group in groups]


def _common(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens with which all sequences begin."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return [column[0] for column in columns]


def batches(items: Iterable[T], size: int, length: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut items into batches of at most ``size``, the longest first, each with at most PADDING padded positions."""
    batch: list[T] = []
    padding = 0
    for item in sorted(items, key=length, reverse=True):
        padding += length(batch[0]) - length(item) if batch else 0
        if batch and (len(batch) == size or padding > PADDING):
            yield batch
            batch, padding = [], 0
        batch.append(item)
    if batch:
        yield batch


def packs(windows: Iterable[Answer], size: int) -> Iterator[list[Answer]]:
    """Put windows together in their order: at most ``size``, of PACKED tokens in all where it is more than one."""
    pack: list[Answer] = []
    tokens = 0
    for window in windows:
        tokens += len(window.inputs)
        if pack and (len(pack) == size or tokens > PACKED):
            yield pack
            pack, tokens = [], len(window.inputs)
        pack.append(window)
    if pack:
        yield pack


def _padded(sequences: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, (B, T) each; which token fills padding does not matter."""
    rows = [torch.tensor(tokens, dtype=torch.int64) for tokens in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def cached_hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
    """Run a model on (B, T) tokens that follow those in a cache, and add them to it; final hidden states, (B, T, H).

    mask: (B, tokens in the cache + T) int64. Positions count from its first 1, so padding may be on the left.
    """
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state


def _selected(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Take rows of a cache, any number of times, and leave the cache as it is."""
    chosen = copy(cache)
    chosen.layers = [copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def _resumable(config: PretrainedConfig) -> bool:
    """Tell whether a model can go on from a cache by several tokens, which recurrent and convolution layers cannot."""
    layers = DynamicCache(config=config).layers
    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def _unscorable(requests: Sequence[Instance]) -> DataError:
    names = ", ".join(sorted({str(request.task_name) for request in requests}))
    return DataError(
        f"task {names} asks for more than log-likelihoods, which is all that is computed without an engine that "
        "writes; take it out of eval.tasks"
    )
