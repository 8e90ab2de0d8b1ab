"""Which rule a server draws tokens by: the one that was asked for, or one that it has from somewhere else.

Every rule makes of the model's distribution p another one, q. The likelihood ratio of two rules on tokens that one of
them drew is a martingale under that one, so it exceeds k with probability 1/k at most (Ville 1939): a rule that is k
times as likely as the one asked for is told apart with that confidence, after however many tokens. What no rule of the
list explains shows in the surprise: under the right rule −log q minus the entropy of q is a martingale too.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdctl.model.batch import collate, predicting_hidden
from kdctl.model.head import head_of, token_chunk
from kdctl.rollout.sampling import Sampling
from kdctl.run.records import Rollout

SURE = math.log(1e6)
"""Log-likelihood ratio at which a rule is taken for the one that a server draws by."""
SHARE = 0.01
"""Part of p that is mixed into every rule: a server's rounding must not make a token impossible that is on its edge."""
SIGMAS = 6.0
"""Standard deviations that the surprise may be off."""


@dataclass(frozen=True)
class Rule:
    """How tokens are drawn from logits. Zero, or one for ``top_p`` and the penalty, does nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def log_probabilities(self, ordered: Tensor) -> Tensor:
        """Return log q for (N, V) float32 logits in descending order, −inf where a token is left out."""
        if self.temperature == 0:
            kept = torch.arange(ordered.shape[-1], device=ordered.device) < 1
            return torch.zeros_like(ordered).masked_fill(~kept, -torch.inf)
        logits = ordered / self.temperature
        if self.top_k:
            logits[:, self.top_k :] = -torch.inf
        if self.min_p:
            logits = logits.masked_fill(logits < logits[:, :1] + math.log(self.min_p), -torch.inf)
        if self.top_p < 1:
            likely = logits.softmax(-1)
            logits = logits.masked_fill(likely.cumsum(-1) - likely >= self.top_p, -torch.inf)
        return logits.log_softmax(-1)

    def penalized(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Return logits with those of tokens made smaller that came before (Keskar et al. 2019); seen: (N, V) bool."""
        smaller = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, smaller, logits)

    def __str__(self) -> str:
        """Return what it does, as settings."""
        changed = {name: value for name, value in vars(self).items() if value != getattr(Rule(), name)}
        return ", ".join(f"{name}={value:g}" for name, value in changed.items()) or "temperature=1"


USUAL = (
    *(Rule(temperature=value) for value in (0.6, 0.7, 0.8, 0.9)),
    *(Rule(top_p=value) for value in (0.8, 0.9, 0.95)),
    *(Rule(top_k=value) for value in (20, 40, 50)),
    *(Rule(min_p=value) for value in (0.05, 0.1)),
    *(Rule(repetition_penalty=value) for value in (1.05, 1.1, 1.2)),
    Rule(0.8, 0.95, 40, 0.05),
    Rule(0.6, 0.95, 20),
    Rule(0.7, 0.8, 20),
    Rule(0.6, 0.9),
)
"""Rules that servers and the files beside models have as defaults."""


def rules_of(folder: Path) -> list[Rule]:
    """Return the rule that the file beside a model has as default, and each part of it."""
    try:
        stated = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        parts = {name: stated[name] for name in vars(Rule()) if isinstance(stated.get(name), int | float)}
    except (OSError, ValueError, AttributeError):
        return []
    return [replace(Rule(), **parts), *(replace(Rule(), **{name: value}) for name, value in parts.items())]


@dataclass(frozen=True)
class Reading:
    """What a model in this process says of given completions, one number a token, end to end.

    plain: log p; asked: log q of the rule that was asked for, −inf where it excludes the token.
    """

    plain: Tensor
    asked: Tensor
    ratios: dict[Rule, float]
    """Log-likelihood ratio of other rules to the one that was asked for."""
    surprise: float
    """Standard deviations by which −log q is off the entropy of q."""


def asked_rule(sampling: Sampling) -> Rule:
    """Return the rule that a sampling stands for."""
    return Rule(sampling.temperature, sampling.top_p, sampling.top_k)


def log_probabilities(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> Tensor:
    """Return the log-probability of every completion token at temperature 1, (M,) float32 on the CPU."""
    return torch.cat([plain for plain, *_ in _rows(model, rollouts, [])])


def read(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    sampling: Sampling,
    others: Iterable[Rule],
    stop: Sequence[int] = (),
) -> Reading:
    """Have a model read completions that a server drew, and compare rules that it may have drawn them by.

    stop: the tokens that no rule draws before ``min_new_tokens``.
    """
    rules = [asked_rule(sampling), *dict.fromkeys(others)]
    parts = list(_rows(model, rollouts, rules, stop, sampling.min_new_tokens))
    plain = torch.cat([part[0] for part in parts])
    chosen = torch.cat([part[1] for part in parts], -1).double()  # (rules, M)
    excess, variance = (torch.cat([part[place] for part in parts]).double() for place in (2, 3))
    mixed = ((1 - SHARE) * chosen.exp() + SHARE * plain.double().exp()).log()
    ratios = (mixed - mixed[0]).sum(-1).tolist()
    sound = chosen[0].isfinite()
    spread = variance[sound].sum().sqrt().item()
    surprise = excess[sound].sum().item() / spread if spread > 0 else 0.0
    return Reading(plain, chosen[0].float(), dict(zip(rules[1:], ratios[1:], strict=True)), surprise)


def _rows(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    rules: Sequence[Rule],
    stop: Sequence[int] = (),
    shortest: int = 0,
) -> Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield, for parts of the tokens: log p (m,), log q of each rule (r, m), −log q − H(q) and its variance (m,)."""
    batch = collate(rollouts)
    with torch.no_grad():  # not inference mode, whose tensors a divided model cannot gather into again
        hidden, targets, head = predicting_hidden(model, batch), batch.targets(), head_of(model)
    before = _before(rollouts) if rules else []
    size = max(1, token_chunk(head.weight.shape[0]) // 4)
    for first in range(0, len(targets), size):
        part = slice(first, first + size)
        logits = head.logits(hidden[part]).cpu()
        chosen = targets[part].unsqueeze(-1)
        plain = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)
        if not rules:
            yield plain, plain, plain, plain
            continue
        seen = torch.zeros(logits.shape, dtype=torch.bool)
        for row, (place, tokens) in enumerate(before[part]):
            seen[row, tokens] = True
            if place < shortest:
                logits[row, [*stop]] = -torch.inf
        own = logits.sort(-1, descending=True)
        picked = []
        for rule in rules:
            order = own
            if rule.repetition_penalty != 1:
                order = rule.penalized(logits, seen).sort(-1, descending=True)
            logs = rule.log_probabilities(order.values)
            picked.append(logs[order.indices == chosen])
            if rule is rules[0]:
                likely, minus = logs.exp(), -logs.masked_fill(logs.isinf(), 0.0)
                entropy = (likely * minus).sum(-1)
                spread = (likely * (minus - entropy.unsqueeze(-1)) ** 2).sum(-1)
        yield plain, torch.stack(picked), -picked[0] - entropy, spread


def _before(rollouts: Sequence[Rollout]) -> list[tuple[int, list[int]]]:
    """List, for each token that carries loss, its place in the completion and all tokens before it."""
    return [
        (place, [*rollout.prompt_ids, *rollout.completion_ids[:place]])
        for rollout in rollouts
        for place in range(0 if rollout.prompt_ids else 1, len(rollout.completion_ids))
    ]
