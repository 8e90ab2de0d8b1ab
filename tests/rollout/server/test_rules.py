"""Rules against their definitions in float64, and how surely one is told from another."""

import math

import pytest
import torch

from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling, nucleus
from kdctl.rollout.server.rules import SIGMAS, SURE, USUAL, Rule, asked_rule, log_probabilities, read, rules_of
from kdctl.run.records import Prompt

PROMPTS = [Prompt(f"p{i}", i, [10 + i, 20, 30, 40 + i]) for i in range(8)]


def drawn(model, rule, tokens=48):
    """Have the model draw by a rule; a penalty is none of the sampler's."""
    sampling = Sampling(rule.temperature, rule.top_p, rule.top_k, tokens, 0, 3)
    return InProcess(model, (258,), "teacher").complete([(prompt, 0) for prompt in PROMPTS], sampling)


@pytest.mark.parametrize(
    "rule", [Rule(), Rule(0.7), Rule(top_p=0.8), Rule(top_k=5), Rule(min_p=0.1), Rule(0.8, 0.9, 9)]
)
def test_a_rule_is_its_definition(rule):
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 3
    order = logits.sort(-1, descending=True)
    found = torch.empty_like(logits).scatter(-1, order.indices, rule.log_probabilities(order.values.clone()))
    expected = logits.double() / rule.temperature
    if rule.top_k:
        expected = expected.masked_fill(expected < expected.topk(rule.top_k).values[:, -1:], -torch.inf)
    if rule.min_p:
        likely = expected.softmax(-1)
        expected = expected.masked_fill(likely < rule.min_p * likely.amax(-1, keepdim=True), -torch.inf)
    if rule.top_p < 1:
        expected = nucleus(expected.softmax(-1), rule.top_p).log()
    torch.testing.assert_close(found.double(), expected.log_softmax(-1), atol=1e-5, rtol=0)


def test_greedy_leaves_one_token():
    ordered = torch.tensor([[2.0, 1.0, 0.5]])
    assert Rule(temperature=0).log_probabilities(ordered).tolist() == [[0.0, -math.inf, -math.inf]]


def test_a_penalty_makes_what_came_before_less_likely():
    found = Rule(repetition_penalty=2.0).penalized(
        torch.tensor([[2.0, -1.0, 3.0]]), torch.tensor([[True, True, False]])
    )
    assert found.tolist() == [[1.0, -2.0, 3.0]]


def test_log_probabilities_are_the_models(teacher_fp32):
    rollouts = drawn(teacher_fp32, Rule(), 10)
    stated = torch.tensor([value for rollout in rollouts for value in rollout.logprobs or []])
    torch.testing.assert_close(log_probabilities(teacher_fp32, rollouts), stated, atol=1e-4, rtol=0)


@pytest.mark.parametrize("asked", [Rule(), Rule(top_p=0.9), Rule(0.8, 0.95, 40)])
def test_who_draws_as_asked_is_never_accused(teacher_fp32, asked):
    rollouts = drawn(teacher_fp32, asked)
    found = read(teacher_fp32, rollouts, Sampling(asked.temperature, asked.top_p, asked.top_k, 48, 0, 0), USUAL)
    assert max(found.ratios.values()) < SURE
    assert abs(found.surprise) < SIGMAS


@pytest.mark.parametrize("other", [Rule(0.6), Rule(top_p=0.9), Rule(top_k=20), Rule(0.6, 0.95, 20)])
def test_another_rule_is_told_from_a_few_hundred_tokens(teacher_fp32, other):
    found = read(teacher_fp32, drawn(teacher_fp32, other), Sampling(1.0, 1.0, 0, 48, 0, 0), USUAL)
    named, ratio = max(found.ratios.items(), key=lambda pair: pair[1])
    assert ratio > SURE
    assert named == other


def test_a_rule_that_no_list_has_shows_in_the_surprise(teacher_fp32):
    found = read(teacher_fp32, drawn(teacher_fp32, Rule(temperature=3.0)), Sampling(1.0, 1.0, 0, 48, 0, 0), [])
    assert found.surprise > SIGMAS
    assert found.ratios == {}


def test_the_file_beside_a_model_gives_its_rule_and_each_part(tmp_path):
    assert rules_of(tmp_path) == []
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "eos_token_id": 2}')
    assert rules_of(tmp_path) == [Rule(0.6, top_k=20), Rule(0.6), Rule(top_k=20)]
    (tmp_path / "generation_config.json").write_text("[]")
    assert rules_of(tmp_path) == []


def test_a_rule_says_what_it_does():
    assert str(Rule()) == "temperature=1"
    assert str(Rule(0.8, top_k=40)) == "temperature=0.8, top_k=40"
    assert asked_rule(Sampling(0.5, 0.9, 3, 8, 0, 0)) == Rule(0.5, 0.9, 3)
