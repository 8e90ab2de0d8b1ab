"""One token: it follows the distribution that the settings leave of the model's."""

import dataclasses

import pytest
import torch
from scipy.stats import chi2, chisquare
from torch import Tensor

from kdctl.base.rng import uniform
from kdctl.rollout.sampling import Sampling, nucleus, sample

EXACT = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=24, min_new_tokens=0, seed=0)


def sampling(**changes) -> Sampling:
    return dataclasses.replace(EXACT, **changes)


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Test counts against probabilities by chi-square; tokens expected fewer than five times are taken as one."""
    total = counts.sum()
    expected = probabilities.double() / probabilities.double().sum() * total
    rare = expected < 5
    seen = [*counts[~rare].tolist(), counts[rare].sum().item()]
    wanted = [*expected[~rare].tolist(), expected[rare].sum().item()]
    if wanted[-1] < 5:
        seen[-2:], wanted[-2:] = [sum(seen[-2:])], [sum(wanted[-2:])]
    return float(chisquare(seen, wanted).pvalue)


def counts_of(tokens: Tensor, vocabulary: int) -> Tensor:
    return torch.bincount(tokens, minlength=vocabulary)


@pytest.fixture
def logits() -> Tensor:
    """One row of uneven logits, (1, 264)."""
    return torch.randn(1, 264, generator=torch.Generator().manual_seed(0)) * 2.5


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_sample_follows_softmax_over_keyed_uniforms(logits, temperature):
    draws = 20_000
    uniforms = torch.tensor([uniform("test", 1, i) for i in range(draws)], dtype=torch.float64)
    tokens = sample(logits.expand(draws, -1), uniforms, sampling(temperature=temperature))
    counts = counts_of(tokens, 264)
    assert p_value(counts, (logits[0].double() / temperature).softmax(-1)) > 1e-3
    assert p_value(counts, (logits[0].double() / (temperature * 1.1)).softmax(-1)) < 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_every_token_is_drawn_on_exactly_its_share_of_the_unit_interval(logits, temperature):
    logits = logits * 0.4
    probabilities = (logits[0].double() / temperature).softmax(-1)
    middles = probabilities.cumsum(-1) - probabilities / 2
    tokens = sample(logits.expand(264, -1), middles, sampling(temperature=temperature))
    wide = (probabilities > 1e-6).nonzero().flatten()  # narrower ones are below what float32 probabilities resolve
    assert torch.equal(tokens[wide], wide)
    assert len(wide) > 250


def test_greedy_takes_the_largest_logit_whatever_the_uniform(logits):
    tokens = sample(logits.expand(5, -1), torch.linspace(0, 0.999, 5, dtype=torch.float64), sampling(temperature=0.0))
    assert tokens.tolist() == [int(logits.argmax())] * 5


@pytest.mark.parametrize("top_k", [1, 2, 10, 264, 1000])
def test_top_k_keeps_exactly_the_k_likeliest(logits, top_k):
    uniforms = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    counts = counts_of(sample(logits.expand(40_000, -1), uniforms, sampling(top_k=top_k)), 264)
    kept = logits[0].topk(min(top_k, 264)).indices
    probabilities = torch.zeros(264, dtype=torch.float64)
    probabilities[kept] = logits[0].double()[kept].softmax(-1)
    assert (counts - probabilities * 40_000).abs().max() <= 2
    assert counts[probabilities == 0].sum() == 0


def test_top_k_keeps_k_tokens_where_logits_are_equal():
    uniforms = torch.linspace(0, 0.999, 500, dtype=torch.float64)
    tokens = sample(torch.zeros(500, 20), uniforms, sampling(top_k=3))
    assert len(set(tokens.tolist())) == 3


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_exactly_the_smallest_set_that_reaches_it(logits, top_p):
    probabilities = logits[0].double().softmax(-1)
    kept, mass = set(), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept.add(token)
        mass += probabilities[token].item()
    found = nucleus(logits.softmax(-1), top_p)[0]
    assert set(found.nonzero().flatten().tolist()) == kept
    assert torch.equal(found[sorted(kept)], logits.softmax(-1)[0][sorted(kept)])
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    counts = counts_of(sample(logits.expand(20_000, -1), uniforms, sampling(top_p=top_p)), 264)
    expected = torch.where(found > 0, probabilities, 0) / mass * 20_000
    assert (counts - expected).abs().max() <= 2


def test_top_p_includes_the_token_that_reaches_it():
    probabilities = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    assert nucleus(probabilities, 0.75).tolist() == [[0.0, 0.5, 0.25, 0.0]]
    assert nucleus(probabilities, 0.76).tolist() == [[0.125, 0.5, 0.25, 0.0]]


def test_token_of_probability_zero_is_never_drawn():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(400, 500, generator=generator) * 20
    impossible = torch.rand(400, 500, generator=generator) < 0.5
    impossible[:, -100:] = True
    impossible[:, :100] = True
    impossible[:, 100] = False
    logits = logits.masked_fill(impossible, -torch.inf)
    for number in (0.0, 5e-324, 1 - 2**-53, 1.0):
        tokens = sample(logits, torch.full((400,), number, dtype=torch.float64), EXACT)
        assert (logits.softmax(-1).gather(-1, tokens.unsqueeze(-1)) > 0).all(), number


def test_chi_square_helper_rejects_a_shifted_distribution():
    probabilities = torch.full((10,), 0.1)
    assert p_value(torch.full((10,), 100), probabilities) == pytest.approx(1.0)
    skewed = torch.tensor([150, 50] * 5)
    statistic = ((skewed - 100) ** 2 / 100).sum().item()
    assert p_value(skewed, probabilities) == pytest.approx(float(chi2.sf(statistic, 9)))
