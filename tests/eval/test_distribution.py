"""KL, agreement and perplexity against naive float64 computations, document by document."""

from collections.abc import Callable
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from made_up import known
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from kdctl.config.preset import QuantizeSection
from kdctl.eval import distribution
from kdctl.eval.distribution import (
    compare,
    compare_teacher,
    make_yardstick,
    summarize,
    text_documents,
    text_perplexity,
)
from kdctl.model.head import Head
from kdctl.quant.apply import build_student, quantize_layers, select_layers
from kdctl.run.documents import PerDocument
from kdctl.run.measures import (
    AGREEMENT,
    FORWARD_KL,
    PERPLEXITY,
    REVERSE_KL,
    TEACHER_PERPLEXITY,
    TOKEN_MEASURES,
    TokenMeasure,
)
from kdctl.run.records import Rollout

PAD = 258  # the end-of-sequence token too
SETTINGS = QuantizeSection(bits=3, group_size=16, method="minmax")


def rollout(index: int, random: np.random.Generator) -> Rollout:
    """Make up a document whose prompt and completion have lengths of their own; it ends with the padding token."""
    prompt, completion = random.integers(0, 256, random.integers(1, 12)), random.integers(0, 256, index + 2)
    return Rollout(str(index), index, 0, prompt.tolist(), [*completion.tolist(), PAD], None, "stop", 0, 0, "teacher")


@pytest.fixture
def rollouts() -> list[Rollout]:
    """Return more documents than fit one batch, shuffled."""
    random = np.random.default_rng(0)
    found = [rollout(i, random) for i in range(2 * distribution.BATCH + 3)]
    return [found[i] for i in random.permutation(len(found))]


def student_of(teacher: PreTrainedModel) -> PreTrainedModel:
    return build_student(teacher, quantize_layers(teacher, select_layers(teacher, SETTINGS), SETTINGS))


@torch.no_grad()
def completion_logits(model: PreTrainedModel, document: Rollout) -> Tensor:
    """Return the logits that predict a document's completion, (completion tokens, V) float64, without padding."""
    ids = torch.tensor([document.prompt_ids + document.completion_ids])
    return model(ids).logits[0, len(document.prompt_ids) - 1 : -1].double()


def naive(teacher: PreTrainedModel, student: PreTrainedModel, document: Rollout) -> list[float]:
    """Compute a document's tokens, and its sums in the order of the measures."""
    p = completion_logits(teacher, document).softmax(-1)
    q = completion_logits(student, document).softmax(-1)
    targets = torch.tensor(document.completion_ids).unsqueeze(-1)
    sums = [
        (p * (p.log() - q.log())).sum(),
        (q * (q.log() - p.log())).sum(),
        (p.argmax(-1) == q.argmax(-1)).sum(),
        -q.gather(-1, targets).log().sum(),
        -p.gather(-1, targets).log().sum(),
    ]
    return [len(document.completion_ids), *map(float, sums)]


def by_length(rollouts: list[Rollout]) -> list[Rollout]:
    return sorted(rollouts, key=lambda r: len(r.prompt_ids) + len(r.completion_ids))


def test_document_sums_are_those_of_a_naive_float64_computation(teacher_fp32: PreTrainedModel, rollouts: list[Rollout]):
    student = student_of(teacher_fp32)
    found = compare(student, make_yardstick(teacher_fp32, rollouts))
    expected = np.array([naive(teacher_fp32, student, document) for document in by_length(rollouts)]).T
    assert found.mean(FORWARD_KL) > 0.1
    assert 0.05 < found.mean(AGREEMENT) < 0.95
    assert list(found.sums) == ["forward_kl", "reverse_kl", "agree", "nll", "teacher_nll"]
    for (name, values), reference in zip(columns(found).items(), expected, strict=True):
        np.testing.assert_allclose(values, reference, rtol=1e-4, atol=1e-4, err_msg=name)


def columns(found: PerDocument) -> dict[str, np.ndarray]:
    return {"tokens": found.tokens, **found.sums}


@pytest.mark.parametrize("measure", TOKEN_MEASURES.values(), ids=TOKEN_MEASURES)
def test_one_measure_alone_is_what_it_is_among_all(
    teacher: PreTrainedModel, rollouts: list[Rollout], measure: TokenMeasure
):
    student, yardstick = student_of(teacher), make_yardstick(teacher, rollouts)
    alone = compare(student, yardstick, measures=[measure])
    assert list(alone.sums) == [measure.column]
    assert np.array_equal(alone[measure], compare(student, yardstick)[measure])


@pytest.mark.parametrize("measure", [PERPLEXITY, TEACHER_PERPLEXITY, FORWARD_KL])
def test_only_the_heads_that_a_measure_reads_are_multiplied(
    teacher: PreTrainedModel, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch, measure: TokenMeasure
):
    student, yardstick = student_of(teacher), make_yardstick(teacher, rollouts)
    heads, used = {id(yardstick.head): "teacher"}, []
    multiply = Head.__call__

    def counted(self: Head, hidden: Tensor) -> Tensor:
        used.append(heads.get(id(self), "student"))
        return multiply(self, hidden)

    monkeypatch.setattr(Head, "__call__", counted)
    compare(student, yardstick, measures=[measure])
    wanted = {"pair": {"teacher", "student"}, "student": {"student"}, "teacher": {"teacher"}}
    assert set(used) == wanted[measure.of]
    used.clear()
    compare_teacher(yardstick)
    assert len(used) == len(yardstick.batches)


def test_the_teacher_against_itself_is_the_teacher_in_the_students_place(
    teacher: PreTrainedModel, rollouts: list[Rollout]
):
    yardstick = make_yardstick(teacher, rollouts)
    expected = columns(compare(teacher, yardstick))
    for name, values in columns(compare_teacher(yardstick)).items():
        assert np.array_equal(values, expected[name]), name


@pytest.mark.parametrize("fixture", ["teacher", "teacher_fp32"])
def test_a_model_has_no_divergence_from_itself(request: pytest.FixtureRequest, rollouts: list[Rollout], fixture: str):
    model: PreTrainedModel = request.getfixturevalue(fixture)
    found = compare(model, make_yardstick(model, rollouts))
    assert (found[FORWARD_KL] == 0).all()
    assert (found[REVERSE_KL] == 0).all()
    assert (found[AGREEMENT] == found.tokens).all()
    summary = summarize(found)
    assert (known(summary.top1_agreement).low, known(summary.top1_agreement).high) == (1, 1)
    assert summary.perplexity.value == pytest.approx(summary.teacher_perplexity, rel=1e-12)


def test_only_completion_tokens_count(teacher_fp32: PreTrainedModel, rollouts: list[Rollout]):
    yardstick = make_yardstick(teacher_fp32, rollouts)
    targets = torch.cat([batch.targets() for batch in yardstick.batches]).tolist()
    assert targets == [token for document in by_length(rollouts) for token in document.completion_ids]
    assert sum(len(states) for states in yardstick.states) == len(targets)
    found = compare(teacher_fp32, yardstick)
    assert found.tokens.tolist() == [len(document.completion_ids) for document in by_length(rollouts)]


def test_completion_does_not_depend_on_the_documents_beside_it(teacher_fp32: PreTrainedModel, rollouts: list[Rollout]):
    student = student_of(teacher_fp32)
    together = compare(student, make_yardstick(teacher_fp32, rollouts[:5]))
    alone = [compare(student, make_yardstick(teacher_fp32, [document])) for document in by_length(rollouts[:5])]
    for name, values in columns(together).items():
        np.testing.assert_allclose(values, [columns(one)[name][0] for one in alone], rtol=1e-4, atol=1e-4, err_msg=name)


def test_summary_is_per_token_with_intervals_around_it():
    random = np.random.default_rng(0)
    tokens = random.integers(3, 90, 50).astype(np.float64)
    sums = {name: tokens * random.uniform(0.1, 1, 50) for name in ("forward_kl", "reverse_kl", "nll", "teacher_nll")}
    sums["agree"] = np.floor(tokens * random.uniform(0, 1, 50))
    summary = summarize(PerDocument(tokens, sums))
    means = {name: values.sum() / tokens.sum() for name, values in sums.items()}
    assert summary.forward_kl.value == means["forward_kl"]
    assert known(summary.reverse_kl).value == means["reverse_kl"]
    assert known(summary.top1_agreement).value == means["agree"]
    assert summary.perplexity.value == pytest.approx(np.exp(means["nll"]), rel=1e-14)
    assert summary.teacher_perplexity == pytest.approx(np.exp(means["teacher_nll"]), rel=1e-14)
    assert (summary.documents, summary.tokens) == (50, int(tokens.sum()))
    for found in (summary.forward_kl, summary.reverse_kl, summary.top1_agreement, summary.perplexity):
        estimate = known(found)
        assert estimate.low < estimate.value < estimate.high


def test_progress_counts_every_batch(teacher: PreTrainedModel, rollouts: list[Rollout]):
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int):
        seen.append((done, total))

    callback: Callable[[int, int], None] = note
    compare(teacher, make_yardstick(teacher, rollouts, callback), callback)
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


@pytest.mark.parametrize("tokens", [100, 1500, 513])
def test_text_is_the_help_topics_cut_to_the_token_count(tokenizer: PreTrainedTokenizerBase, tokens: int):
    documents = text_documents(tokenizer, tokens)
    assert tokens - 1 <= sum(map(len, documents)) <= tokens
    for name, ids in zip(sorted(topics), documents, strict=False):
        assert 2 <= len(ids) <= distribution.TEXT_WINDOW
        whole = tokenizer(topics[name], add_special_tokens=False)["input_ids"]
        assert whole[: len(ids)] == ids  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]


@torch.no_grad()
def test_text_perplexity_is_the_models_own_loss(teacher_fp32: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    documents = [ids[: 40 + 7 * i] for i, ids in enumerate(text_documents(tokenizer, 9000)[:20])]
    assert len(documents) == 20 > distribution.BATCH
    losses = []
    for document in documents:
        ids = torch.tensor([document])
        losses.append(float(teacher_fp32(ids, labels=ids).loss.double()) * (len(document) - 1))
    predicted = sum(len(document) - 1 for document in documents)
    found = text_perplexity(teacher_fp32, documents)
    assert (found.tokens, found.documents) == (predicted, 20)
    assert found.perplexity.value == pytest.approx(np.exp(sum(losses) / predicted), rel=1e-5)
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high
