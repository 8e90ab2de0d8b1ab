"""vLLM's OpenAI server: ``/v1/completions`` with token ids both ways."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from kdctl.config.preset import Form
from kdctl.rollout.server.client import Client, Refused
from kdctl.rollout.server.protocol import About, Draw, Drawn, Malformed, number, numbers, pick, token_ids

FORCE = 100.0
"""What is added to the logit of a token that is to be drawn; vLLM takes no more."""


class Vllm:
    """Speaks to vLLM."""

    kind: ClassVar[str] = "vllm"
    form: ClassVar[Form] = "packed"
    ids_advice: ClassVar[str] = "return_token_ids needs vLLM 0.10.2 or newer, without a proxy that drops it"
    raw_advice: ClassVar[str] = "start vLLM without --logprobs-mode, or with raw_logprobs"
    reload_advice: ClassVar[str] = (
        "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment, or give rollout.restart, or have kdctl start it "
        "with rollout.serve='vllm'"
    )
    own_defaults_advice: ClassVar[str] = "start vLLM with --generation-config vllm and without other logits processors"
    masks_stop: ClassVar[bool] = True

    def __init__(self, about: About):
        self.about = about

    @staticmethod
    async def recognise(client: Client) -> About | None:
        """Return what a server says of itself if it is of this kind."""
        try:
            version = pick(await client.get("/version"), "version")
            model = pick(await client.get("/v1/models"), "data", 0)
            return About(str(version), str(pick(model, "id")), model.get("max_model_len"))
        except (Refused, Malformed):
            return None

    def fields(self, draw: Draw) -> dict[str, Any]:
        """Return all fields of a request but the prompt."""
        return {
            "model": self.about.model,
            "max_tokens": draw.max_new_tokens,
            "min_tokens": draw.min_new_tokens,
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "top_k": draw.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": draw.seed,
            "stop": [],
            "stop_token_ids": [*draw.stop],
            "ignore_eos": True,  # stop_token_ids hold it where it is to stop at
            "n": 1,
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "cache_salt": f"kdctl-{draw.epoch}",  # nothing computed with other weights is ever reused
        }

    async def draw(self, client: Client, draw: Draw) -> Drawn:
        """Draw one completion."""
        body = {**self.fields(draw), "prompt": [*draw.prompt_ids]}
        if draw.forced is not None:
            body["logit_bias"] = {str(draw.forced): FORCE}
        answer = await client.post("/v1/completions", body)
        choices = pick(answer, "choices")
        if not isinstance(choices, list) or len(choices) != 1:
            raise Malformed(f"it answers one request with {len(choices or [])} completions")
        choice = choices[0]
        ids = token_ids(pick(choice, "token_ids"), "token_ids")
        if (echoed := choice.get("prompt_token_ids")) is not None and echoed != [*draw.prompt_ids]:
            raise Malformed(f"it read {len(echoed)} prompt tokens that are not the {len(draw.prompt_ids)} sent")
        found = choice.get("logprobs") or {}
        logprobs = numbers(found.get("token_logprobs", []), "logprobs.token_logprobs")
        prompt_tokens = pick(answer, "usage", "prompt_tokens")
        return Drawn(ids, logprobs, pick(choice, "finish_reason") == "stop", prompt_tokens)

    async def score(self, client: Client, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> list[float]:
        """Return the log-probabilities of given tokens, from a prompt that holds them."""
        whole = [*prompt_ids, *completion_ids]
        draw = Draw(whole, 1.0, 1.0, 0, 0, 1, (), 0)
        answer = await client.post("/v1/completions", {**self.fields(draw), "prompt": whole, "prompt_logprobs": 0})
        found = pick(answer, "choices", 0, "prompt_logprobs")
        if not isinstance(found, list) or len(found) != len(whole):
            raise Malformed("its answer has no prompt_logprobs, one for each token of the prompt")
        places = range(len(prompt_ids), len(whole))
        return [number(pick(found, place, str(whole[place]), "logprob")) for place in places]

    async def reload(self, client: Client, folder: Path) -> None:
        """Replace the weights through the engine's own loader, and forget keys and values of the old ones."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        await client.post("/collective_rpc", call)
        await client.post("/reset_prefix_cache", {})
