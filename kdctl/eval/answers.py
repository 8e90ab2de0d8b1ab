"""Answers to lm-eval's ``generate_until`` requests, written by a rollout engine.

Contexts become the same tokens as in lm-eval's ``HFLM``, and completions the same texts. Every token is drawn with a
random number keyed by (seed, item, sample, position), so that models that are compared have them in common.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdctl.base.errors import DataError
from kdctl.config.preset import EvalSection
from kdctl.config.resolve import canonical
from kdctl.eval.likelihood import Encoder, LikelihoodModel
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.work import RolloutEngine
from kdctl.run.records import Prompt, Rollout

KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
"""What a task may ask of generation."""
GRAM = 4


@dataclass(frozen=True)
class Written:
    """What a model answered. text: as lm-eval judges it, up to the first text that ends it.

    tokens: how many were needed; ended: by a stop token or such a text, not by the longest length.
    """

    text: str
    tokens: int
    ended: bool
    repetition: float


class AnswerWriter:
    """Has an engine answer requests. max_tokens and reach are the model's, as ``Encoder`` has them."""

    def __init__(self, engine: RolloutEngine, encoder: Encoder, settings: EvalSection):
        self.engine, self.encoder, self.settings = engine, encoder, settings
        self.sample = 0
        """Which of several answers to each item is written."""
        self.written: dict[tuple[str | None, int | None], Written] = {}
        """The last answers, by task and document."""

    def write(self, requests: Sequence[Instance], answered: Callable[[Instance], None]) -> list[str]:
        """Answer requests, in order; answered: told of each one that is done."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[canonical(arguments(request)[1])].append(index)
        texts: dict[int, str] = {}
        for indices in groups.values():
            together = [requests[index] for index in indices]
            for index, answer in zip(indices, self._write(together, answered), strict=True):
                self.written[requests[index].task_name, requests[index].doc_id] = answer
                texts[index] = answer.text
        return [texts[index] for index in range(len(requests))]

    def _write(self, requests: Sequence[Instance], answered: Callable[[Instance], None]) -> list[Written]:
        """Answer requests that ask for the same of generation."""
        wanted = generation(requests[0], self.encoder.tokenizer)
        sampling = Sampling(**sampling_of(wanted, self.settings), min_new_tokens=0, seed=self.settings.seed)
        items = [(self._prompt(request, sampling.max_new_tokens), self.sample) for request in requests]
        ends = Ends(self.encoder.tokenizer, wanted["until"])
        found = self.engine.complete(
            items,
            sampling,
            finished=lambda place, _: answered(requests[place]),
            until=lambda _, tokens: ends.reached(tokens),
        )
        return [ends.answer(one) for one in found]

    def _prompt(self, request: Instance, longest: int) -> Prompt:
        """Encode a context; one that leaves no room for the answer loses its beginning, as in lm-eval."""
        context, _ = arguments(request)
        room = self.encoder.max_tokens - longest
        tokens = self.encoder.encode(context)[-room:] if room > 0 else []
        where = f"task {request.task_name!r}, document {request.doc_id}"
        if not tokens:
            raise DataError(
                f"{where}: an answer of up to {longest} tokens leaves no room for a question within the "
                f"{self.encoder.max_tokens} that the model reads; take the task out of eval.tasks"
            )
        if not self.encoder.reach.has(len(tokens) + longest):
            raise DataError(
                f"{where}: {len(tokens) + longest} tokens with the answer, and {self.encoder.reach.why}; lower "
                "eval.num_fewshot or take the task out of eval.tasks"
            )
        return Prompt(hashlib.sha256(context.encode()).hexdigest()[:16], request.doc_id or 0, tokens)


class LiveModel(LikelihoodModel):
    """A live model as lm-eval sees it, for all requests that kdctl knows; an engine writes with its weights."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: RolloutEngine, settings: EvalSection
    ):
        super().__init__(model, tokenizer, settings.batch_size)
        self.answers = AnswerWriter(engine, self.encoder, settings)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return each request's answer, up to the first text that ends it."""
        return self.answers.write(requests, lambda one: self.cache_hook.add_partial("generate_until", one.args, None))


def arguments(request: Instance) -> tuple[str, dict[str, Any]]:
    """Return what is to be continued, and how."""
    context, wanted = request.arguments
    return context, wanted


def generation(request: Instance, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Read what a request asks of generation, as lm-eval reads it. Raises DataError for what no engine here does."""
    wanted: dict[str, Any] = dict(normalize_gen_kwargs(arguments(request)[1]))
    if others := sorted(wanted.keys() - KNOWN):
        raise DataError(
            f"task {request.task_name!r} asks generation for {', '.join(others)}, which kdctl has not; take it out of "
            "eval.tasks"
        )
    ends = tokenizer.eos_token_id
    eos = str(tokenizer.decode(ends)) if isinstance(ends, int) else None
    return {**wanted, "until": [text for text in handle_stop_sequences(wanted.get("until"), eos) if text]}


def sampling_of(wanted: dict[str, Any], settings: EvalSection) -> dict[str, Any]:
    """Return how tokens are drawn: as the task asks, at the preset's temperature where that is set."""
    greedy = not wanted.get("do_sample")
    own = 0.0 if greedy else float(wanted.get("temperature", 1.0))
    return {
        "temperature": own if settings.temperature is None else settings.temperature,
        "top_p": float(wanted.get("top_p", 1.0)),
        "top_k": int(wanted.get("top_k", 0)),
        "max_new_tokens": int(wanted["max_gen_toks"]),
    }


class Ends:
    """Finds where a completion is at an end for lm-eval: at the first of some texts in what it decodes to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]):
        self.tokenizer, self.texts = tokenizer, [*texts]
        self._tail = max((len(text.encode()) for text in texts), default=0) + 3
        """Tokens that hold any of the texts, a byte each and a few for what decoding does at a beginning."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens without special ones."""
        return str(self.tokenizer.decode([*tokens], skip_special_tokens=True))

    def reached(self, tokens: Sequence[int]) -> bool:
        """Tell whether the last token completed one of the texts."""
        return self._has(tokens[-self._tail :]) and self._has(tokens)

    def answer(self, rollout: Rollout) -> Written:
        """Cut a completion where it is at an end."""
        tokens = rollout.completion_ids
        ended = self._has(tokens)
        if ended:
            tokens = tokens[: self._needed(tokens)]
        text = postprocess_generated_text(self.decode(tokens), self.texts, None)
        return Written(text, len(tokens), ended or rollout.finish_reason == "stop", repetition(tokens))

    def _has(self, tokens: Sequence[int]) -> bool:
        decoded = self.decode(tokens)
        return any(text in decoded for text in self.texts)

    def _needed(self, tokens: Sequence[int]) -> int:
        """Return how many of the first tokens hold one of the texts."""
        low, high = 0, len(tokens)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._has(tokens[:middle]) else (middle, high)
        return high


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of runs of four tokens that occurred before (seq-rep-4, Welleck et al. 2019, section 6.1)."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
