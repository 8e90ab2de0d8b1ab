"""Samples come from the model's own distribution, whatever the batch, and the stored log-probabilities are its."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig, PreTrainedModel, Qwen3Config

from kdctl.config.preset import RolloutSection
from kdctl.model.attention import RowCache
from kdctl.rollout.sampler import PREFIX, InProcess, Row, common_prefix
from kdctl.rollout.sampling import Sampling
from kdctl.run.records import Prompt, Rollout
from tests.rollout.test_sampling import counts_of, p_value
from tests.tally import Tally

EOS = 258
EXACT = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=24, min_new_tokens=0, seed=0)
STOPS = (EOS, *range(16), *range(100, 116))
"""Many ways to stop, so that rows of a block finish at different steps."""


def sampling(**changes) -> Sampling:
    return dataclasses.replace(EXACT, **changes)


def ragged_prompts(count: int = 6) -> list[Prompt]:
    """Make prompts of very different lengths."""
    return [Prompt(f"p{i}", i, [(37 * i + 11 * j) % 256 for j in range(2 + 7 * i)]) for i in range(count)]


def generate(model: PreTrainedModel, prompts: list[Prompt], settings: Sampling, stop=STOPS, step=0) -> list[Rollout]:
    """Generate one completion a prompt, all in one block."""
    return InProcess(model, stop, "teacher").complete([(prompt, 0) for prompt in prompts], settings, step)


@torch.no_grad()
def full_logprobs(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """Compute log-probabilities of the whole vocabulary at each completion token, (T, V), in one pass."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    return model(input_ids=ids).logits[0].float().log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]


@torch.no_grad()
def next_probabilities(model: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> Tensor:
    return (model(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)


@pytest.fixture
def eager_eos(teacher_fp32: PreTrainedModel) -> PreTrainedModel:
    """Make a model that wants to stop at every step: a large bias on its end-of-sequence token."""
    bias = torch.zeros(teacher_fp32.config.vocab_size)
    bias[EOS] = 40.0
    head = teacher_fp32.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    head.bias = nn.Parameter(bias, requires_grad=False)
    return teacher_fp32


# --- whole completions ------------------------------------------------------------------------------------------------


def test_greedy_equals_transformers_token_for_token(teacher_fp32):
    prompts = ragged_prompts()
    found = generate(teacher_fp32, prompts, sampling(temperature=0.0))
    for prompt, rollout in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt.prompt_ids])
        config = GenerationConfig(do_sample=False, max_new_tokens=24, eos_token_id=list(STOPS), pad_token_id=EOS)
        expected = teacher_fp32.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert rollout.completion_ids == expected[0, ids.shape[1] :].tolist()
    assert len({len(rollout.completion_ids) for rollout in found}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_do_not_depend_on_the_rest_of_the_block(teacher_fp32, temperature):
    prompts = ragged_prompts()
    together = generate(teacher_fp32, prompts, sampling(temperature=temperature))
    alone = [generate(teacher_fp32, [prompt], sampling(temperature=temperature))[0] for prompt in prompts]
    turned = generate(teacher_fp32, prompts[::-1], sampling(temperature=temperature))[::-1]
    for one, two, three in zip(together, alone, turned, strict=True):
        assert one.completion_ids == two.completion_ids == three.completion_ids
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
    assert len({len(rollout.completion_ids) for rollout in together}) > 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_rows_that_follow_others_get_the_tokens_of_one_large_batch(teacher_fp32, temperature, batch_size):
    items = [(prompt, sample) for prompt in ragged_prompts(7) for sample in range(2)]
    settings = sampling(temperature=temperature)
    large = InProcess(teacher_fp32, STOPS, "teacher").complete(items, settings)
    drawn: list[int] = []
    small = InProcess(teacher_fp32, STOPS, "teacher", batch_size).complete(items, settings, progress=drawn.append)
    assert [rollout.completion_ids for rollout in small] == [rollout.completion_ids for rollout in large]
    assert max(drawn) == batch_size
    assert sum(drawn) == sum(len(rollout.completion_ids) for rollout in large)


def test_completions_of_one_prompt_share_its_reading(teacher_fp32):
    read: list[int] = []
    hook = teacher_fp32.base_model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    prompts = ragged_prompts(3)
    items = [(prompt, sample) for prompt in prompts for sample in range(4)]
    found = InProcess(teacher_fp32, (EOS,), "teacher").complete(items, EXACT)
    hook.remove()
    assert read[0] == sum(len(prompt.prompt_ids) for prompt in prompts)
    alone = [InProcess(teacher_fp32, (EOS,), "teacher").complete([item], EXACT)[0] for item in items]
    assert [rollout.completion_ids for rollout in found] == [rollout.completion_ids for rollout in alone]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_all_prompts_begin_with_is_read_once(teacher_fp32, temperature):
    shared = [(53 * i) % 256 for i in range(PREFIX)]
    prompts = [Prompt(f"p{i}", i, shared + [(37 * i + 11 * j) % 256 for j in range(1 + 3 * i)]) for i in range(7)]
    read: list[int] = []
    hook = teacher_fp32.base_model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    items, settings = [(prompt, sample) for prompt in prompts for sample in range(2)], sampling(temperature=temperature)
    found = InProcess(teacher_fp32, STOPS, "teacher", 5).complete(items, settings)
    hook.remove()
    assert read[0] == PREFIX
    drawn = sum(len(rollout.completion_ids) for rollout in found)
    assert sum(read) <= PREFIX + 2 * sum(len(prompt.prompt_ids) - PREFIX for prompt in prompts) + drawn
    alone = [InProcess(teacher_fp32, STOPS, "teacher").complete([item], settings)[0] for item in items]
    assert [rollout.completion_ids for rollout in found] == [rollout.completion_ids for rollout in alone]
    for one, other in zip(found, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_prefix_is_shorter_than_every_prompt_and_long_enough_to_pay():
    shared = list(range(PREFIX))
    assert common_prefix([[*shared, 1], [*shared, 2]]) == PREFIX
    assert common_prefix([[*shared, 1, 1], [*shared, 1]]) == PREFIX
    assert common_prefix([shared, [*shared, 1]]) == 0  # less than the shortest, and then too few
    assert common_prefix([[*shared[1:], 1], [*shared[1:], 2]]) == 0
    assert common_prefix([[*shared, 1]]) == 0
    assert common_prefix([[1, 2], [1, 3], [2]]) == 0


def test_long_prompts_are_read_in_several_passes(teacher_fp32, monkeypatch):
    whole = generate(teacher_fp32, ragged_prompts(), EXACT)
    monkeypatch.setattr("kdctl.rollout.sampler.PROMPT_TOKENS", 40)
    parts = generate(teacher_fp32, ragged_prompts(), EXACT)
    assert [rollout.completion_ids for rollout in parts] == [rollout.completion_ids for rollout in whole]


SHAPE = {"vocab_size": 264, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.15}
OTHER_KINDS = {
    "sliding window": MistralConfig(
        **SHAPE, hidden_size=64, intermediate_size=128, num_key_value_heads=2, sliding_window=8
    ),
    "normalised heads": Qwen3Config(**SHAPE, hidden_size=64, intermediate_size=96, num_key_value_heads=4, head_dim=24),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_model_sample_the_same_in_any_block(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHER_KINDS[kind]).eval()
    prompts = ragged_prompts(4)
    for prompt, rollout in zip(prompts, generate(model, prompts, EXACT), strict=True):
        assert rollout.completion_ids == generate(model, [prompt], EXACT)[0].completion_ids
        chosen = full_logprobs(model, rollout).gather(-1, torch.tensor(rollout.completion_ids).unsqueeze(-1))
        torch.testing.assert_close(torch.tensor(rollout.logprobs), chosen.squeeze(-1), atol=1e-4, rtol=0)


def test_first_and_second_tokens_follow_the_model(teacher_fp32):
    prompt = Prompt("q", 0, list(range(40, 52)))
    settings = sampling(max_new_tokens=2)
    found = InProcess(teacher_fp32, (EOS,), "teacher").complete([(prompt, i) for i in range(4000)], settings)
    first = torch.tensor([rollout.completion_ids[0] for rollout in found])
    probabilities = next_probabilities(teacher_fp32, prompt.prompt_ids)
    assert p_value(counts_of(first, 264), probabilities) > 1e-3
    assert p_value(counts_of(first, 264), next_probabilities(teacher_fp32, prompt.prompt_ids, 1.25)) < 1e-6
    likely = int(probabilities.argmax())
    second = torch.tensor([r.completion_ids[1] for r in found if r.completion_ids[0] == likely])
    assert len(second) > 200
    given = next_probabilities(teacher_fp32, [*prompt.prompt_ids, likely])
    assert p_value(counts_of(second, 264), given) > 1e-3


def test_temperature_shapes_the_completions_and_not_the_stored_logprobs(teacher_fp32):
    prompt = Prompt("q", 0, list(range(40, 52)))
    settings = sampling(temperature=0.6, max_new_tokens=1)
    found = InProcess(teacher_fp32, (EOS,), "teacher").complete([(prompt, i) for i in range(3000)], settings)
    first = torch.tensor([rollout.completion_ids[0] for rollout in found])
    assert p_value(counts_of(first, 264), next_probabilities(teacher_fp32, prompt.prompt_ids, 0.6)) > 1e-3
    assert p_value(counts_of(first, 264), next_probabilities(teacher_fp32, prompt.prompt_ids)) < 1e-6
    plain = next_probabilities(teacher_fp32, prompt.prompt_ids).log()
    stored = torch.tensor([rollout.logprobs for rollout in found], dtype=torch.float64).squeeze(-1)
    torch.testing.assert_close(stored, plain[first], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 1.5},
        {"temperature": 0.5, "min_new_tokens": 12},
        {"top_k": 5, "min_new_tokens": 3},
        {"top_p": 0.5},
    ],
)
def test_stored_logprobs_are_the_unmasked_models_at_temperature_one(teacher_fp32, changes):
    for rollout in generate(teacher_fp32, ragged_prompts(), sampling(**changes)):
        assert rollout.logprobs is not None
        chosen = full_logprobs(teacher_fp32, rollout).gather(-1, torch.tensor(rollout.completion_ids).unsqueeze(-1))
        torch.testing.assert_close(torch.tensor(rollout.logprobs), chosen.squeeze(-1), atol=1e-4, rtol=0)


def test_mean_surprise_of_exact_samples_is_the_models_entropy(teacher_fp32):
    prompt = Prompt("q", 0, list(range(40, 52)))
    found = InProcess(teacher_fp32, (EOS,), "teacher").complete(
        [(prompt, i) for i in range(3000)], sampling(max_new_tokens=1)
    )
    surprise = -torch.tensor([rollout.logprobs for rollout in found], dtype=torch.float64).squeeze(-1)
    probabilities = next_probabilities(teacher_fp32, prompt.prompt_ids)
    entropy = -(probabilities * probabilities.log()).sum()
    error = surprise.std() / math.sqrt(len(surprise))
    assert (surprise.mean() - entropy).abs() < 4 * error


def test_nothing_is_inherited_from_the_generation_configuration(teacher_fp32):
    before = generate(teacher_fp32, ragged_prompts(), EXACT)
    teacher_fp32.generation_config = GenerationConfig(
        do_sample=True,
        top_k=1,
        top_p=0.1,
        temperature=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        max_new_tokens=1,
        min_new_tokens=20,
        eos_token_id=1,
        suppress_tokens=list(range(200)),
    )
    assert generate(teacher_fp32, ragged_prompts(), EXACT) == before


def test_only_the_asked_top_k_and_top_p_restrict(teacher_fp32):
    for changes, size in (({"top_k": 2}, 2), ({"top_p": 1e-6}, 1), ({}, 264)):
        for rollout in generate(teacher_fp32, ragged_prompts(), sampling(**changes)):
            better = full_logprobs(teacher_fp32, rollout)
            chosen = better.gather(-1, torch.tensor(rollout.completion_ids).unsqueeze(-1))
            ranks = (better > chosen + 1e-5).sum(-1)
            assert ranks.max() < size
    exact = [full_logprobs(teacher_fp32, r) for r in generate(teacher_fp32, ragged_prompts(), EXACT)]
    assert sum(map(len, exact)) > 20


# --- where a completion ends ------------------------------------------------------------------------------------------


def test_completions_end_at_the_first_stop_token_or_the_limit(teacher_fp32):
    found = generate(teacher_fp32, ragged_prompts(12), EXACT)
    for rollout in found:
        *body, last = rollout.completion_ids
        assert not set(body) & set(STOPS)
        assert rollout.finish_reason == ("stop" if last in STOPS else "length")
        assert rollout.finish_reason == "stop" or len(rollout.completion_ids) == 24
        assert rollout.logprobs is not None
        assert len(rollout.logprobs) == len(rollout.completion_ids)
    assert Counter(r.finish_reason for r in found).keys() == {"stop", "length"}


def test_end_of_sequence_is_kept_where_it_is_the_padding_token(eager_eos):
    for rollout in generate(eager_eos, ragged_prompts(), EXACT, (EOS,)):
        assert rollout.completion_ids == [EOS]
        assert rollout.finish_reason == "stop"


def test_stop_at_the_last_allowed_token_is_a_stop(eager_eos):
    settings = sampling(max_new_tokens=4, min_new_tokens=3)
    for rollout in generate(eager_eos, ragged_prompts(), settings, (EOS,)):
        assert rollout.completion_ids[3] == EOS
        assert (len(rollout.completion_ids), rollout.finish_reason) == (4, "stop")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_new_tokens_masks_every_stop_token(eager_eos, temperature):
    settings = sampling(min_new_tokens=5, temperature=temperature)
    for rollout in generate(eager_eos, ragged_prompts(), settings):
        assert not set(rollout.completion_ids[:5]) & set(STOPS)
        assert rollout.completion_ids[5:] == [EOS]
        assert rollout.logprobs is not None
        assert max(rollout.logprobs[:5]) < -10  # under the unmasked model these tokens are very unlikely
        assert rollout.logprobs[5] > -0.1


def test_masked_first_token_follows_the_renormalised_model(teacher_fp32):
    prompt = Prompt("q", 0, list(range(40, 52)))
    probabilities = next_probabilities(teacher_fp32, prompt.prompt_ids)
    stop = probabilities.topk(3).indices.tolist()
    settings = sampling(max_new_tokens=1, min_new_tokens=1)
    found = InProcess(teacher_fp32, stop, "teacher").complete([(prompt, i) for i in range(3000)], settings)
    counts = counts_of(torch.tensor([rollout.completion_ids[0] for rollout in found]), 264)
    assert counts[stop].sum() == 0
    assert p_value(counts, probabilities.index_fill(0, torch.tensor(stop), 0.0)) > 1e-3


def test_masking_is_on_record():
    settings = RolloutSection(min_new_tokens=7, max_new_tokens=9, temperature=0.5, top_k=3, top_p=0.9, seed=4)
    record = Sampling.of(settings).record()
    expected = settings.model_dump(include=set(type(record).model_fields))
    assert record.model_dump() == expected
    assert expected["min_new_tokens"] == 7


# --- keys -------------------------------------------------------------------------------------------------------------


def test_same_key_same_rollouts(teacher_fp32):
    assert generate(teacher_fp32, ragged_prompts(), EXACT) == generate(teacher_fp32, ragged_prompts(), EXACT)


def test_other_key_other_tokens(teacher_fp32):
    ids = list(range(40, 60))

    def tokens(name: str = "p", index: int = 0, sample_index: int = 0, seed: int = 0, step: int = 0) -> tuple[int, ...]:
        engine = InProcess(teacher_fp32, (EOS,), "teacher")
        (rollout,) = engine.complete([(Prompt(name, index, ids), sample_index)], sampling(seed=seed), step)
        return tuple(rollout.completion_ids)

    others = [tokens(name="other"), tokens(sample_index=1), tokens(seed=1), tokens(step=1)]
    assert len({tokens(), *others}) == 5
    assert tokens(index=7) == tokens()


def test_global_random_state_is_neither_read_nor_moved(teacher_fp32):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate(teacher_fp32, ragged_prompts(), EXACT)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert generate(teacher_fp32, ragged_prompts(), EXACT) == first


def test_rollouts_say_where_they_come_from(teacher_fp32):
    prompts = ragged_prompts(2)
    items = [(prompts[1], 0), (prompts[1], 1), (prompts[0], 5)]
    found = InProcess(teacher_fp32, (EOS,), "student").complete(items, sampling(seed=9), policy_step=12)
    assert [(r.prompt_id, r.prompt_index, r.sample_index) for r in found] == [("p1", 1, 0), ("p1", 1, 1), ("p0", 0, 5)]
    assert [r.prompt_ids for r in found] == [prompt.prompt_ids for prompt, _ in items]
    assert {(r.seed, r.policy_step, r.source) for r in found} == {(9, 12, "student")}


def test_progress_counts_every_token(teacher_fp32):
    drawn: list[int] = []
    engine = InProcess(teacher_fp32, STOPS, "teacher")
    found = engine.complete([(prompt, 0) for prompt in ragged_prompts()], EXACT, progress=drawn.append)
    assert sum(drawn) == sum(len(rollout.completion_ids) for rollout in found)
    assert drawn == sorted(drawn, reverse=True)


# --- what the host sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"min_new_tokens": 9}, {"max_new_tokens": 7}], ids=str)
@pytest.mark.parametrize("batch_size", [3, 64])
def test_how_often_the_host_looks_changes_no_token(teacher_fp32, changes, batch_size):
    items = [(prompt, sample) for prompt in ragged_prompts() for sample in range(2)]
    found = {}
    for look in (1, 5, 100):
        ended, counted = [], []
        engine = InProcess(teacher_fp32, STOPS, "teacher", batch_size, look)
        found[look] = engine.complete(
            items,
            sampling(**changes),
            progress=counted.append,
            finished=lambda place, rollout: ended.append((place, rollout)),  # noqa: B023 - called at once
            until=lambda place, tokens: place == 3 and len(tokens) == 6,
        )
        assert sorted(place for place, _ in ended) == list(range(len(items)))
        assert all(found[look][place] == rollout for place, rollout in ended)
        assert sum(counted) == sum(len(one.completion_ids) for one in found[look])
    assert len(found[1][3].completion_ids) <= 6
    for look in (5, 100):
        for one, other in zip(found[1], found[look], strict=True):
            assert one.completion_ids == other.completion_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_between_two_looks_nothing_is_read_and_operators_do_not_grow_with_rows(teacher_fp32, monkeypatch):
    drawn, counts = InProcess._draw_on, []

    def counted(self, rows, *rest):
        with Tally() as tally:
            found = drawn(self, rows, *rest)
        assert tally.reads == 0
        counts.append((len(rows), tally.operators, tally.made))
        return found

    monkeypatch.setattr(InProcess, "_draw_on", counted)
    for rows in (2, 6):
        engine = InProcess(teacher_fp32, [EOS], "teacher", look=8)
        engine.complete([(prompt, 0) for prompt in ragged_prompts(rows)], sampling(max_new_tokens=8, min_new_tokens=8))
    (two, operators, made), (six, *others) = counts
    assert (two, six) == (2, 6)
    assert [operators, made] == others
    assert made <= 6


def test_drawing_needs_no_number_of_the_device(teacher_fp32):
    engine = InProcess(teacher_fp32, [EOS], "teacher", look=4)
    rows = [Row(prompt, 0) for prompt in ragged_prompts(3)]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        cache = RowCache(4, 60)
        steps = engine._steps(cache, 4, sampling(top_k=5, top_p=0.9, min_new_tokens=2))
        logits = engine._forward([], rows, cache, 0)
        found = engine._draw_on(rows, logits, steps, 0)
        assert found.shape == (2, 4, 3)
        with pytest.raises((DataDependentOutputException, RuntimeError)):
            found.tolist()
