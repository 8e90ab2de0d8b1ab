"""A small server that speaks each protocol with a real model behind it, and misbehaves where it is told to."""

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kdctl.formats.student import read_student
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.rollout.server.rules import log_probabilities
from kdctl.run.records import Prompt, Rollout

EVERY = 2**30
CPU = torch.device("cpu")


class Stub:
    """One server. faults: what it does wrong, by name; stop: tokens at which it always stops, as llama-server does."""

    def __init__(self, kind: str, model: PreTrainedModel, faults: set[str], stop: tuple[int, ...] = (258,)):
        self.kind, self.model, self.faults, self.stop = kind, model, faults, stop
        self.seen: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.loaded: list[Path] = []
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.url = ""

    # What a protocol asks for, in terms of the model.

    def draw(
        self, ids: list[int], sampling: Sampling, stop: list[int], bias: dict[int, float]
    ) -> tuple[list[int], list]:
        """Draw a completion and its log-probabilities at temperature 1, or forced to begin with a token."""
        if "inherits" in self.faults:
            sampling = Sampling(0.6, 0.8, 5, sampling.max_new_tokens, sampling.min_new_tokens, sampling.seed)
        if bias:
            tokens = [next(iter(bias))]
            while tokens[-1] not in stop and len(tokens) < sampling.max_new_tokens:
                tokens.append(tokens[0])
            return tokens, self.score(ids, tokens, sampling)
        engine = InProcess(self.model, stop, "stub")
        with self.lock:
            (found,) = engine.complete([(Prompt("stub", 0, self._read(ids)), 0)], sampling)
        return found.completion_ids, self.score(ids, found.completion_ids, sampling)

    def score(self, prompt: list[int], tokens: list[int], sampling: Sampling | None = None) -> list[float]:
        """Return log-probabilities of given tokens."""
        rollout = Rollout("stub", 0, 0, self._read(prompt), tokens, None, "stop", 0, 0, "stub")
        with self.lock:
            values = log_probabilities(self.model, [rollout])
            if "processed" in self.faults and sampling is not None and sampling.temperature not in (0, 1):
                values = _tempered(self.model, rollout, sampling.temperature)
        found = values.tolist()
        if "noise" in self.faults:
            found = [value + 0.03 * (-1) ** place for place, value in enumerate(found)]
        if "nan" in self.faults:
            found[0] = float("nan")
        if "order" in self.faults:
            found = [*reversed(found)]
        return found

    def _read(self, prompt: list[int]) -> list[int]:
        """Return a prompt as it is read."""
        return [prompt[0], *prompt] if "double_bos" in self.faults else prompt

    def reload(self, folder: Path) -> None:
        """Take up another model's weights."""
        self.loaded.append(folder)
        if "stale" not in self.faults:
            with self.lock:
                self.model = read_student(folder, CPU).model

    # The protocols.

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Return the status and content of an answer."""
        if path == "/restart":
            self.reload(Path(body["weights"]))
            return 200, None
        found = getattr(self, f"_{self.kind.replace('-', '_')}")(path, body)
        return found if found is not None else (404, {"error": f"no such page {path}"})

    def _vllm(self, path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        pages = {
            "/health": None,
            "/version": {"version": "0.32.0"},
            "/v1/models": {"data": [{"id": "stub", "max_model_len": 512}]},
            "/reset_prefix_cache": None,
        }
        if path in pages:
            return 200, pages[path]
        if path == "/collective_rpc" and "no_reload" not in self.faults:
            self.reload(Path(body["kwargs"]["weights_path"]))
            return 200, {"results": [None]}
        if path != "/v1/completions":
            return None
        ids = body["prompt"]
        if body.get("prompt_logprobs") == 0:
            values = self.score(ids[:1], ids[1:])
            listed = [None, *({str(one): {"logprob": value}} for one, value in zip(ids[1:], values, strict=True))]
            return 200, {"choices": [{"prompt_logprobs": listed}], "usage": {"prompt_tokens": len(ids)}}
        sampling = Sampling(
            body["temperature"],
            body["top_p"],
            max(0, body["top_k"]),
            body["max_tokens"],
            0 if "ends_early" in self.faults else body["min_tokens"],
            body["seed"],
        )
        bias = {int(key): value for key, value in body.get("logit_bias", {}).items()}
        tokens, values = self.draw(ids, sampling, body["stop_token_ids"], bias)
        choice = {
            "token_ids": tokens,
            "logprobs": {"token_logprobs": values},
            "finish_reason": "stop" if tokens[-1] in body["stop_token_ids"] else "length",
        }
        if "drops_ids" in self.faults:
            del choice["token_ids"]
        if "more" in self.faults:
            choice["token_ids"] = [*tokens, 1, 1]
        count = 2 if "two" in self.faults else 1
        return 200, {"choices": [choice] * count, "usage": {"prompt_tokens": len(ids) + self._added()}}

    def _sglang(self, path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        pages = {
            "/health": None,
            "/get_model_info": {"model_path": "stub"},
            "/get_server_info": {"version": "0.5.23", "context_length": 512},
        }
        if path in pages:
            return 200, pages[path]
        if path == "/update_weights_from_disk":
            self.reload(Path(body["model_path"]))
            return 200, {"success": "no_reload" not in self.faults, "message": "Failed"}
        if path != "/generate":
            return None
        ids, asked = body["input_ids"], body["sampling_params"]
        if body["logprob_start_len"] >= 0:
            start = body["logprob_start_len"]
            values = [None, *self.score(ids[:1], ids[1:])]
            triples = [[value, one, None] for value, one in zip(values, ids, strict=True)][start:]
            return 200, {"meta_info": {"input_token_logprobs": triples}}
        top_k = 0 if asked["top_k"] >= EVERY else asked["top_k"]
        sampling = Sampling(
            asked["temperature"],
            asked["top_p"],
            top_k,
            asked["max_new_tokens"],
            asked["min_new_tokens"],
            asked["sampling_seed"],
        )
        bias = {int(key): value for key, value in asked.get("logit_bias", {}).items()}
        tokens, values = self.draw(ids, sampling, asked["stop_token_ids"], bias)
        kind = "stop" if tokens[-1] in asked["stop_token_ids"] else "length"
        if "drops_stop" in self.faults and kind == "stop":
            tokens, values = tokens[:-1], values[:-1]
        meta = {
            "output_token_logprobs": [[value, one, None] for value, one in zip(values, tokens, strict=True)],
            "finish_reason": {"type": kind},
            "prompt_tokens": len(ids) + self._added(),
        }
        return 200, {"output_ids": [] if "drops_ids" in self.faults else tokens, "meta_info": meta}

    def _llama_server(self, path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        if path == "/health":
            return 200, {"status": "ok"}
        if path == "/props":
            settings = {"n_ctx": 512, "params": {}}
            props = {"build_info": "b9999", "model_path": "/m/stub.gguf", "default_generation_settings": settings}
            return 200, props
        if path != "/completion":
            return None
        sampling = Sampling(body["temperature"], body["top_p"], body["top_k"], body["n_predict"], 0, body["seed"])
        tokens, values = self.draw(body["prompt"], sampling, [*self.stop], dict(body.get("logit_bias", [])))
        taken = {**body, "min_p": 0.05} if "says_inherits" in self.faults else body
        entries = [{"id": one, "logprob": value} for one, value in zip(tokens, values, strict=True)]
        if "no_logprobs" in self.faults and "logit_bias" not in body:
            entries = entries[1:]
        return 200, {
            "tokens": [] if "drops_ids" in self.faults else tokens,
            "tokens_evaluated": len(body["prompt"]) + self._added(),
            "stop_type": "eos" if tokens[-1] in self.stop else "limit",
            "truncated": False,
            "generation_settings": taken,
            "completion_probabilities": entries,
        }

    def _added(self) -> int:
        return int("double_bos" in self.faults and "silently" not in self.faults)


def _tempered(model: PreTrainedModel, rollout: Rollout, temperature: float) -> torch.Tensor:
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    with torch.inference_mode():
        logs = (model(ids).logits[0].float() / temperature).log_softmax(-1)
    first = len(rollout.prompt_ids)
    return logs[torch.arange(first - 1, ids.shape[1] - 1), ids[0, first:]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def do_GET(self) -> None:
        self._do({})

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["content-length"]))
        self._do({"weights": sent.decode()} if self.path == "/restart" else json.loads(sent))

    def _do(self, body: dict[str, Any]) -> None:
        stub = self.stub
        stub.seen[self.path] += 1
        stub.bodies.append(body)
        stub.headers.append(dict(self.headers))
        work = self.path in ("/v1/completions", "/generate", "/completion")
        if work and "hangs" in stub.faults:
            stub.released.wait(30)
        dead = any(stub.seen[self.path] > int(fault[11:]) for fault in stub.faults if fault.startswith("dies_after_"))
        if work and (dead or "closes_all" in stub.faults):
            self.close_connection = True
            self.connection.close()
            return
        if "closes" in stub.faults and work and stub.seen[self.path] % 3 == 1:
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
            return
        status, content = 200, None
        if "busy" in stub.faults and work and stub.seen[self.path] % 2:
            status, content = 429, {"error": {"message": "too many requests"}}
        elif "locked" in stub.faults:
            status, content = 401, {"error": "invalid api key"}
        else:
            status, content = stub.answer(self.path, body)
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if status == 429:
            self.send_header("retry-after", "0")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # who asked may have gone
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(kind: str, model: PreTrainedModel, *faults: str, stop: tuple[int, ...] = (258,)) -> Iterator[Stub]:
    """Serve a model on a free port while a block runs."""
    stub = Stub(kind, model, set(faults), stop)
    handler = type("Handler", (_Handler,), {"stub": stub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        stub.released.set()
        server.shutdown()
        server.server_close()
