"""What has to be true of a server before its completions are trained on, and what it means where it is not."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from kdctl.base.errors import ServerError
from kdctl.rollout.server.gap import BOUND, Gap
from kdctl.rollout.server.pool import Place
from kdctl.rollout.server.rules import SIGMAS, SURE, Reading, Rule
from kdctl.run.records import Rollout

BEFORE_PROMPT = "or it puts a token before the prompt"


def check_rule(place: Place, looked: Sequence[Rollout], found: Reading, rule: Rule) -> None:
    """Raise ServerError unless stated log-probabilities are those of temperature 1 and draws follow the request.

    looked: completions that the server drew; found: what the model in this process says of them.
    """
    stated = torch.tensor([value for rollout in looked for value in rollout.logprobs or []])
    plain, asked = ((stated - other).abs().mean().item() for other in (found.plain, found.asked))
    if not plain <= BOUND:
        why = f"something changes them on their way, {BEFORE_PROMPT} of a request and not before what is only scored"
        if asked <= BOUND:
            why = f"they are those after temperature and masks; {place.server.raw_advice}"
        raise ServerError(
            f"{place.described} states log-probabilities of its tokens that are {plain:.3f} nats a token off those of "
            f"the model at temperature 1, and {BOUND:g} is the most: {why}"
        )
    other, ratio = max(found.ratios.items(), key=lambda pair: pair[1])
    if ratio > SURE:
        raise ServerError(
            f"{place.described} does not draw as it was asked to: its tokens are e^{ratio:.0f} times likelier under "
            f"{other} than under {rule}, which was sent. It has defaults of its own that win over the request; "
            f"{place.server.own_defaults_advice}"
        )
    if abs(found.surprise) > SIGMAS:
        raise ServerError(
            f"{place.described} does not draw as it was asked to: its tokens are {found.surprise:+.1f} standard "
            f"deviations off what {rule} draws; {place.server.own_defaults_advice}"
        )


def first_tokens(config: PretrainedConfig, prompt_ids: Sequence[int]) -> list[int | None]:
    """List what a server may put before a prompt unasked: its first token once more, or the model's beginning."""
    own = config.get_text_config().bos_token_id
    return [None, own] if isinstance(own, int) and own != prompt_ids[0] else [None]


def with_token(rollouts: Sequence[Rollout], token: int | None) -> list[Rollout]:
    """Return completions behind prompts that have one more token before them, None for their first one once more."""
    return [
        replace(one, prompt_ids=[one.prompt_ids[0] if token is None else token, *one.prompt_ids]) for one in rollouts
    ]


def check_prompt(place: Place, moved: Sequence[float | None]) -> None:
    """Raise ServerError where a server reads more than the prompt that it was sent.

    moved: for tokens that it may put before it, the slope of its log-probabilities on what such a token changes.
    """
    if any(one is not None and one > 0.5 for one in moved):
        raise ServerError(
            f"{place.described} puts a token before the prompt that was not sent, as a second beginning of sequence: "
            "its log-probabilities move as with one. Switch that off there, or in the tokenizer beside its weights"
        )


def check_gap(place: Place, found: Gap, policy_step: int, folder: str) -> None:
    """Raise ServerError unless a server holds the right weights. folder: where they are."""
    if found.sound:
        return
    if found.mean <= BOUND:
        raise ServerError(
            f"{place.described} still has the weights of before step {policy_step}: on {found.tokens} tokens it moved "
            f"{found.slope:.2f} of the way from the old student to the new one. Training would go on with another "
            f"policy's completions; {place.server.reload_advice}"
        )
    when = f" after step {policy_step}" if policy_step else ""
    raise ServerError(
        f"{place.described} does not hold these weights{when}: its log-probabilities of {found.tokens} tokens are "
        f"{found.mean:.3f} nats off on average and {found.largest:.1f} at most, and {BOUND:g} on average is the most "
        f"that rounding makes. It serves another model than {folder}, or an older one, {BEFORE_PROMPT}"
    )
