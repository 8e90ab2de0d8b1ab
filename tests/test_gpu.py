"""On a GPU: loss, forward pass and sampler are those of the CPU, and a step waits for nothing on the host."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

from kdctl.config.preset import DistillSection, QuantizeSection
from kdctl.distill.by_source import BySource
from kdctl.distill.divergence import Objective, divergence
from kdctl.distill.feed import Feed
from kdctl.distill.loop import Trainer
from kdctl.distill.shadow import make_shadow
from kdctl.model.batch import Batch, collate, predicting_hidden, predicting_states
from kdctl.model.head import Head, head_of
from kdctl.model.load import load_model
from kdctl.model.varlen import Ends, in_one_call, one_by_one, takes
from kdctl.quant.apply import build_student, dense, quantize_layers, select_layers
from kdctl.rollout import steps
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.run.records import Prompt, Rollout

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def on_gpu(tiny_dir_fp32: Path) -> PreTrainedModel:
    """Load the tiny teacher onto the GPU, fp32."""
    return load_model(tiny_dir_fp32, torch.float32, GPU)


@pytest.fixture
def waits_are_errors() -> Iterator[None]:
    """Make every wait of the host for the device an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def made_up(count: int) -> list[Rollout]:
    """Make rollouts of random tokens and of different lengths."""
    generator, made = torch.Generator().manual_seed(0), []
    for index in range(count):
        prompt, completion = ((3, 9), (11, 2), (1, 30))[index % 3]
        ids = torch.randint(0, 256, (prompt + completion,), generator=generator).tolist()
        made.append(Rollout(str(index), index, 0, ids[:prompt], ids[prompt:], None, "length", 0, 0, "teacher"))
    return made


def ragged() -> Batch:
    """Lay rollouts of random tokens end to end."""
    return collate(made_up(3))


def loss_and_gradient(model: PreTrainedModel, beta: float, vocabulary: int = 40_000) -> list[torch.Tensor]:
    """Compute the divergence of shifted states over a large vocabulary."""
    numbers = torch.Generator().manual_seed(1)
    states = predicting_states(model, ragged())
    weight = torch.randn(vocabulary, states.shape[1], generator=numbers).to(states.device)
    shift = torch.randn(states.shape, generator=numbers).to(states.device)
    hidden = (states + 0.3 * shift).requires_grad_()
    loss = divergence(hidden, states, Head(weight), Objective(beta))
    loss.backward()
    assert hidden.grad is not None
    return [loss.detach(), hidden.grad]


def test_the_forward_pass_is_that_of_the_cpu(on_gpu: PreTrainedModel, teacher_fp32: PreTrainedModel) -> None:
    found, expected = (predicting_states(model, ragged()).cpu() for model in (on_gpu, teacher_fp32))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_the_cpu(
    on_gpu: PreTrainedModel, teacher_fp32: PreTrainedModel, beta: float
) -> None:
    for found, expected in zip(*(loss_and_gradient(model, beta) for model in (on_gpu, teacher_fp32)), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


def test_likeliest_tokens_are_those_of_the_cpu(on_gpu: PreTrainedModel, teacher_fp32: PreTrainedModel) -> None:
    prompts = [(Prompt(str(length), length, list(range(40, 40 + length))), 0) for length in (2, 7, 20)]
    cold = Sampling(1e-4, 1.0, 0, 12, 0, 0)
    found, expected = (InProcess(model, [258], "teacher").complete(prompts, cold) for model in (on_gpu, teacher_fp32))
    assert [one.completion_ids for one in found] == [one.completion_ids for one in expected]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("prefix", [0, 5])
def test_the_kernel_for_all_sequences_sees_what_each_sees(prefix: int, window: int | None) -> None:
    lengths, numbers = (7, 3, 12, 1), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 23, 64, generator=numbers).bfloat16().to(GPU) for heads in (4, 2, 2))
    first = torch.randn(2, 1, 2, prefix, 64, generator=numbers).bfloat16().to(GPU)
    shared = (first[0], first[1]) if prefix else None
    assert takes(query, key, value)
    found = in_one_call(query, key, value, shared, Ends.of(lengths, prefix, GPU), window, 0.125)
    expected = one_by_one(query, key, value, shared, lengths, window, 0.125)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("train", ["weights", "lora", "scales"])
def test_laying_out_and_queueing_a_step_wait_for_nothing(
    tiny_dir: Path, train: Literal["weights", "lora", "scales"], request: pytest.FixtureRequest
) -> None:
    model = load_model(tiny_dir, torch.bfloat16, GPU)
    grid = QuantizeSection(group_size=32, method="minmax")
    weights = quantize_layers(model, select_layers(model, grid), grid)
    settings = DistillSection(train=train, steps=4, lmbda=0.0, micro_batch_size=2, gradient_accumulation=2)
    student = build_student(model, weights)
    trainer = Trainer(
        model, student, make_shadow(settings, student, weights, model), Feed(settings, made_up(8)), settings
    )
    before = trainer.step(0)
    request.getfixturevalue("waits_are_errors")
    work = trainer.lay_out(trainer.feed.rows(1), 1)
    losses, _ = trainer.queue(work, 1e-3, BySource(work.rollouts))
    torch.cuda.set_sync_debug_mode("default")
    assert 0 < float(losses.sum()) / work.tokens < 10 * before["train/forward_kl"]


def test_drawing_between_two_looks_waits_for_nothing(
    on_gpu: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    prompts = [(Prompt(str(length), length, list(range(40, 40 + length))), 0) for length in (2, 7, 20)]
    settings = Sampling(1.0, 0.9, 7, 24, 5, 0)
    monkeypatch.setattr(steps, "replays", lambda _: False)  # a recording is compared once, which waits
    engine = InProcess(on_gpu, [258], "teacher")
    expected = engine.complete(prompts, settings)
    drawn = InProcess._draw_on

    def watched(*given: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return drawn(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(InProcess, "_draw_on", watched)
    assert engine.complete(prompts, settings) == expected


def test_what_is_replayed_draws_what_is_started_one_by_one(
    on_gpu: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [(Prompt(str(length), length, list(range(40, 40 + length))), 0) for length in (2, 7, 20)]
    settings, said, made, record = Sampling(1.0, 0.9, 7, 60, 5, 0), [], [], steps.record

    def recorded(work: Callable[[], None]) -> Callable[[], None]:
        made.append(record(work))
        return made[-1]

    monkeypatch.setattr(steps, "record", recorded)
    engine = InProcess(on_gpu, [258], "teacher", say=said.append)
    found = engine.complete(prompts, settings)
    assert (len(made), said) == (1, [])
    monkeypatch.setattr(steps, "replays", lambda _: False)
    assert engine.complete(prompts, settings) == found


@pytest.mark.parametrize("train", ["weights", "lora", "scales"])
def test_what_is_fused_writes_the_very_weights_that_the_codes_stand_for(
    tiny_dir: Path, train: Literal["weights", "lora", "scales"]
) -> None:
    model = load_model(tiny_dir, torch.bfloat16, GPU)
    grid = QuantizeSection(group_size=32, method="minmax")
    weights = quantize_layers(model, select_layers(model, grid), grid)
    student = build_student(model, weights)
    shadow = make_shadow(DistillSection(train=train), student, weights, model)
    for parameter in shadow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    shadow.write_back()
    for name, weight in shadow.quantized():
        assert torch.equal(student.get_parameter(f"{name}.weight"), dense(weight)), name


def test_forward_loss_and_backward_wait_for_nothing(on_gpu: PreTrainedModel, request: pytest.FixtureRequest) -> None:
    batch, head = ragged().to(GPU), head_of(on_gpu)
    states = predicting_states(on_gpu, batch) * 1.1
    on_gpu.requires_grad_(True)
    divergence(predicting_hidden(on_gpu, batch), states, head, Objective(0.5)).backward()  # builds what lasts
    request.getfixturevalue("waits_are_errors")
    divergence(predicting_hidden(on_gpu, batch), states, head, Objective(0.5)).backward()
