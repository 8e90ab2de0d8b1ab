"""llama.cpp's server: ``/completion`` with token ids both ways.

It gives no log-probability of a token that ends in the middle of a character, and none of a prompt's. Both are read one
token at a time: forced by a bias, which the log-probabilities do not see.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from kdctl.config.preset import Form
from kdctl.rollout.server.client import Client, Refused
from kdctl.rollout.server.protocol import About, Draw, Drawn, Malformed, number, pick, token_ids

FORCE = 1e6
"""What is added to the logit of a token that is to be drawn."""
EVERY = 10**6
"""More tokens than any vocabulary has."""
NEUTRAL: dict[str, Any] = {
    "min_p": 0.0,
    "typical_p": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "dynatemp_range": 0.0,
    "repeat_last_n": 0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "mirostat": 0,
    "ignore_eos": False,
    "backend_sampling": False,
    "post_sampling_probs": False,
}
"""Samplers that are to do nothing, each as sent and as the answer repeats it."""


class Llama:
    """Speaks to llama-server."""

    kind: ClassVar[str] = "llama-server"
    form: ClassVar[Form] = "gguf"
    ids_advice: ClassVar[str] = "return_tokens needs a llama-server of 2025 or newer"
    raw_advice: ClassVar[str] = "post_sampling_probs was sent as false: a proxy in between drops it"
    reload_advice: ClassVar[str] = "give rollout.restart, or have kdctl start it with rollout.serve='llama-server'"
    own_defaults_advice: ClassVar[str] = "start llama-server without sampling options of its own"
    masks_stop: ClassVar[bool] = False

    def __init__(self, about: About):
        self.about = about

    @staticmethod
    async def recognise(client: Client) -> About | None:
        """Return what a server says of itself if it is of this kind."""
        try:
            found = await client.get("/props")
            version, model = pick(found, "build_info"), pick(found, "model_path")
            settings = pick(found, "default_generation_settings")
            return About(str(version), Path(model).name, settings.get("n_ctx"))
        except (Refused, Malformed):
            return None

    def fields(self, draw: Draw) -> dict[str, Any]:
        """Return all fields of a request but the prompt."""
        return {
            **NEUTRAL,
            "samplers": ["temperature", "top_k", "top_p"] if (draw.top_k or draw.top_p < 1) else ["temperature"],
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "top_k": draw.top_k,
            "seed": draw.seed,
            "n_predict": draw.max_new_tokens,
            "n_probs": 1,
            "stop": [],
            "return_tokens": True,
            "cache_prompt": False,
            "stream": False,
        }

    async def draw(self, client: Client, draw: Draw) -> Drawn:
        """Draw one completion."""
        body = {**self.fields(draw), "prompt": [*draw.prompt_ids]}
        if draw.forced is not None:
            body["logit_bias"] = [[draw.forced, FORCE]]
        answer = await client.post("/completion", body)
        if wrong := self.contradictions(answer, draw):
            raise Malformed(f"it takes {', '.join(wrong)}, and the request said otherwise")
        ids = token_ids(pick(answer, "tokens"), "tokens")
        if not ids and answer.get("completion_probabilities"):
            raise Malformed("its answer has no ids of the tokens that it drew")
        if pick(answer, "truncated"):
            raise Malformed(f"it cut a sequence at its context of {self.about.reach} tokens")
        found = [(one.get("id"), one.get("logprob")) for one in answer.get("completion_probabilities", [])]
        ended = pick(answer, "stop_type") == "eos"
        return Drawn(ids, _aligned(ids, found), ended, pick(answer, "tokens_evaluated"))

    async def score(self, client: Client, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> list[float]:
        """Return the log-probabilities of given tokens, drawing each by force behind those before it."""
        found = []
        for place, token in enumerate(completion_ids):
            before = [*prompt_ids, *completion_ids[:place]]
            value = await self._forced(client, before, token)
            found.append(await self._listed(client, before, token) if value is None else value)
        return found

    async def _forced(self, client: Client, before: Sequence[int], token: int) -> float | None:
        """Return the log-probability of a token that is drawn by force; None where it ends within a character."""
        answer = await client.post("/completion", self._one(before, token))
        if pick(answer, "tokens") != [token]:
            raise Malformed(f"it draws {pick(answer, 'tokens')} where a bias of {FORCE:g} forces token {token}")
        found = answer.get("completion_probabilities")
        return None if not found else number(pick(found, 0, "logprob"))

    async def _listed(self, client: Client, before: Sequence[int], token: int) -> float:
        """Find a token in the list of all while another is drawn, which is whole: the prompt's first."""
        answer = await client.post("/completion", {**self._one(before, before[0]), "n_probs": EVERY})
        for one in pick(answer, "completion_probabilities", 0, "top_logprobs"):
            if one.get("id") == token:
                return number(pick(one, "logprob"))
        raise Malformed(f"its list of all tokens has no token {token}")

    def _one(self, before: Sequence[int], token: int) -> dict[str, Any]:
        fields = self.fields(Draw(before, 1.0, 1.0, 0, 0, 1, (), 0))
        return {**fields, "prompt": [*before], "logit_bias": [[token, FORCE]], "cache_prompt": True}

    async def reload(self, client: Client, folder: Path) -> None:
        """Raise Refused: llama-server holds one file as long as it runs."""
        raise Refused(501, "llama-server has no interface for new weights")

    def contradictions(self, answer: Mapping[str, Any], draw: Draw) -> list[str]:
        """Compare the settings that an answer repeats with those that were sent."""
        taken = pick(answer, "generation_settings")
        sent = {name: value for name, value in self.fields(draw).items() if name in taken}
        return [
            f"{name}={taken[name]}"
            for name, value in sent.items()
            if name not in ("seed", "return_tokens", "cache_prompt", "stop") and not _same(taken[name], value)
        ]


def _same(taken: Any, sent: Any) -> bool:
    """Compare a setting with what came back of it, which was a float32 in between."""
    if isinstance(sent, float):
        return isinstance(taken, int | float) and abs(taken - sent) <= 1e-5 * max(1.0, abs(sent))
    return taken == sent


def _aligned(ids: Sequence[int], found: Sequence[tuple[int | None, float | None]]) -> list[float | None]:
    """Give each token its log-probability; all None where it is not sure which of them have none."""
    if [one for one, _ in found] == [*ids]:
        return [value for _, value in found]
    return [None] * len(ids)
