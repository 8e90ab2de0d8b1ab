"""SGLang's native server: ``/generate`` with token ids both ways. Written after its documentation; not run here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from kdctl.config.preset import Form
from kdctl.rollout.server.client import Client, Refused
from kdctl.rollout.server.protocol import About, Draw, Drawn, Malformed, number, numbers, pick, token_ids

FORCE = 100.0
"""What is added to the logit of a token that is to be drawn."""
EVERY = 2**30
"""SGLang's top_k of the whole vocabulary."""


class Sglang:
    """Speaks to SGLang."""

    kind: ClassVar[str] = "sglang"
    form: ClassVar[Form] = "packed"
    ids_advice: ClassVar[str] = "output_ids comes with SGLang's own /generate, not through a router that drops it"
    raw_advice: ClassVar[str] = "start SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment"
    reload_advice: ClassVar[str] = "give rollout.restart, or have kdctl start it with rollout.serve='sglang'"
    own_defaults_advice: ClassVar[str] = (
        "start SGLang with --sampling-defaults openai and no --preferred-sampling-params"
    )
    masks_stop: ClassVar[bool] = True

    def __init__(self, about: About):
        self.about = about

    @staticmethod
    async def recognise(client: Client) -> About | None:
        """Return what a server says of itself if it is of this kind."""
        try:
            model = pick(await _newer(client, "model_info"), "model_path")
            found = await _newer(client, "server_info")
            reach = found.get("context_length") or found.get("max_req_input_len")
            return About(str(found.get("version", "unknown")), str(model), reach)
        except (Refused, Malformed, AttributeError):
            return None

    def fields(self, draw: Draw) -> dict[str, Any]:
        """Return all fields of a request but the prompt."""
        sampling = {
            "max_new_tokens": draw.max_new_tokens,
            "min_new_tokens": draw.min_new_tokens,
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "top_k": draw.top_k or EVERY,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "sampling_seed": draw.seed,
            "stop": [],
            "stop_token_ids": [*draw.stop],
            "ignore_eos": not draw.stop,  # it would make SGLang go on behind stop_token_ids too
            "n": 1,
            "skip_special_tokens": False,
            "no_stop_trim": True,
        }
        return {"sampling_params": sampling, "return_logprob": True, "logprob_start_len": -1, "stream": False}

    async def draw(self, client: Client, draw: Draw) -> Drawn:
        """Draw one completion."""
        body = {**self.fields(draw), "input_ids": [*draw.prompt_ids]}
        if draw.forced is not None:
            body["sampling_params"]["logit_bias"] = {str(draw.forced): FORCE}
        answer = await client.post("/generate", body)
        if isinstance(answer, list):
            raise Malformed(f"it answers one request with {len(answer)} completions")
        meta = pick(answer, "meta_info")
        triples = pick(meta, "output_token_logprobs")
        ids = token_ids(pick(answer, "output_ids"), "output_ids")
        if [pick(one, 1) for one in triples or []] != ids:
            raise Malformed("the tokens of meta_info.output_token_logprobs are not those of output_ids")
        logprobs = numbers([one[0] for one in triples], "meta_info.output_token_logprobs")
        ended = pick(meta, "finish_reason", "type") == "stop"
        return Drawn(ids, logprobs, ended, pick(meta, "prompt_tokens"))

    async def score(self, client: Client, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> list[float]:
        """Return the log-probabilities of given tokens, from a prompt that holds them."""
        whole = [*prompt_ids, *completion_ids]
        body = self.fields(Draw(whole, 1.0, 1.0, 0, 0, 1, (), 0))
        body |= {"input_ids": whole, "logprob_start_len": max(0, len(prompt_ids) - 1)}
        triples = pick(await client.post("/generate", body), "meta_info", "input_token_logprobs")
        found = triples[-len(completion_ids) :]
        if [one[1] for one in found] != [*completion_ids]:
            raise Malformed("the tokens of meta_info.input_token_logprobs are not those that were sent")
        return [number(one[0]) for one in found]

    async def reload(self, client: Client, folder: Path) -> None:
        """Replace the weights from disk; SGLang forgets keys and values of the old ones itself."""
        body = {"model_path": str(folder), "abort_all_requests": False, "flush_cache": True}
        answer = await client.post("/update_weights_from_disk", body)
        if not pick(answer, "success"):
            raise Malformed(f"/update_weights_from_disk says {str(answer.get('message'))[:200]!r}")


async def _newer(client: Client, page: str) -> Any:
    """Return a page under its name of today or the one that it had before."""
    try:
        return await client.get(f"/{page}")
    except Refused:
        return await client.get(f"/get_{page}")
