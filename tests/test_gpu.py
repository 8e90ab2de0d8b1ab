"""On a GPU: loss, forward pass and sampler are those of the CPU, and a step waits for nothing on the host."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from kdctl.distill.divergence import Objective, divergence
from kdctl.model.batch import Batch, collate, predicting_hidden, predicting_states
from kdctl.model.head import Head, head_of
from kdctl.model.load import load_model
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


def ragged() -> Batch:
    """Lay rollouts of random tokens end to end."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, (prompt, completion) in enumerate(((3, 9), (11, 2), (1, 30))):
        ids = torch.randint(0, 256, (prompt + completion,), generator=generator).tolist()
        made.append(Rollout(str(index), index, 0, ids[:prompt], ids[prompt:], None, "length", 0, 0, "teacher"))
    return collate(made)


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


def test_forward_loss_and_backward_wait_for_nothing(on_gpu: PreTrainedModel, request: pytest.FixtureRequest) -> None:
    batch, head = ragged().to(GPU), head_of(on_gpu)
    states = predicting_states(on_gpu, batch) * 1.1
    on_gpu.requires_grad_(True)
    request.getfixturevalue("waits_are_errors")
    divergence(predicting_hidden(on_gpu, batch), states, head, Objective(0.5)).backward()
