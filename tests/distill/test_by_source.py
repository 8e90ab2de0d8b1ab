"""Loss and tokens by source: they add up to the step's own."""

from dataclasses import replace

import pytest
from transformers import PreTrainedModel

from kdctl.distill.monitor import rollout_metrics
from tests.distill.test_loop import accumulated, rollouts, trainer_on


def test_the_parts_of_a_step_add_up_to_it(teacher_fp32: PreTrainedModel) -> None:
    names = ["web", "chat", "web", "chat", "chat", "web"]
    data = [replace(one, prompt_id=f"{name}:{one.prompt_id}") for one, name in zip(rollouts(6), names, strict=True)]
    found = trainer_on(teacher_fp32, data, micro_batch_size=2, gradient_accumulation=3, lmbda=0.0).step(0)
    tokens = {name: found[f"train/completion_tokens/{name}"] for name in ("web", "chat")}
    assert sum(tokens.values()) == found["train/completion_tokens"]
    whole = sum(found[f"train/forward_kl/{name}"] * count for name, count in tokens.items())
    assert whole / found["train/completion_tokens"] == pytest.approx(found["train/forward_kl"], rel=1e-5)
    alone = [one for one in data if one.prompt_id.startswith("web")]
    lone = accumulated(trainer_on(teacher_fp32, alone, micro_batch_size=3), alone)
    assert found["train/forward_kl/web"] == pytest.approx(lone[0], rel=1e-4)
    assert tokens["web"] == lone[1]


def test_one_source_has_no_parts(teacher_fp32: PreTrainedModel) -> None:
    data = rollouts(4)
    found = trainer_on(teacher_fp32, data, micro_batch_size=4).step(0)
    assert not [name for name in found if name.count("/") > 1]


def test_length_and_share_are_of_each_source() -> None:
    data = [replace(one, completion_ids=[1] * (i + 1)) for i, one in enumerate(rollouts(4))]
    data = [replace(one, prompt_id=f"{'a' if i else 'b'}:{i}") for i, one in enumerate(data)]
    found = rollout_metrics(data)
    assert (found["rollout/mean_tokens/a"], found["rollout/share/a"]) == (3.0, 0.75)
    assert (found["rollout/mean_tokens/b"], found["rollout/share/b"]) == (1.0, 0.25)
