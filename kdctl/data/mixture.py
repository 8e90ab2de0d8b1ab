"""Prompts of several sources in one order.

Which source a place takes its prompt from is a keyed draw, so the order is the same at any number of processes and goes
on the same way for more prompts. The k-th prompt of a source is the same one in every mix that draws it, as long as no
earlier source has some of its prompts too.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from kdctl.base.rng import uniform
from kdctl.data.prompt_set import PackedPrompts, PromptSet
from kdctl.run.records import Prompt


def drawn(weights: Mapping[str, float], count: int, seed: int) -> list[str]:
    """Draw the source of each of ``count`` places, with probabilities proportional to weights."""
    names, ends = list(weights), list(accumulate(weights.values()))
    last = len(names) - 1
    return [names[min(bisect_right(ends, uniform("mix", seed, place) * ends[-1]), last)] for place in range(count)]


def interleaved(found: Mapping[str, PromptSet], draws: Sequence[str]) -> PromptSet:
    """Put the prompts of several sources, by their names, in the order of draws, and name them after their sources.

    A place whose source has no more prompts is left out, and counted in ``missing``.
    """
    missing: dict[str, int] = {}
    prompts = PackedPrompts.of(_in_order(found, draws, missing))
    return PromptSet(prompts, sum(one.skipped for one in found.values()), missing=missing)


def _in_order(found: Mapping[str, PromptSet], draws: Sequence[str], missing: dict[str, int]) -> Iterator[Prompt]:
    left, count = {name: iter(one.prompts) for name, one in found.items()}, 0
    for name in draws:
        prompt = next(left[name], None)
        if prompt is None:
            missing[name] = missing.get(name, 0) + 1
        else:
            yield replace(prompt, id=f"{name}:{prompt.id}", index=count)
            count += 1


def sources_of(prompt_ids: Iterable[str]) -> list[str]:
    """List the sources of a mixture that prompts are named after; none where they come from one source."""
    return sorted({source_of(one) for one in prompt_ids} - {""})


def source_of(prompt_id: str) -> str:
    """Return the source of a mixture that a prompt is named after; none otherwise."""
    return prompt_id.rpartition(":")[0]
