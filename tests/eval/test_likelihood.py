"""Log-likelihoods beside those of lm-eval's own HFLM."""

import copy
import importlib
import random
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    SmolLM3Config,
)

from kdctl.base.errors import DataError, ModelError
from kdctl.eval.harness import quiet
from kdctl.eval.likelihood import PADDING, Encoder, LikelihoodModel, batches, questions
from kdctl.model.context import Reach

tiny: Any = importlib.import_module("tiny")
WINDOW = 16
SMALL = tiny.SIZES | {"tie_word_embeddings": False}
MIXED = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES: list[tuple[type[PretrainedConfig], dict[str, Any]]] = [
    (LlamaConfig, {}),
    (LlamaConfig, {"attn_implementation": "eager"}),
    (MistralConfig, {"head_dim": 16, "sliding_window": WINDOW}),
    (Gemma3TextConfig, MIXED),
    (Qwen2Config, {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    (Phi3Config, {"sliding_window": WINDOW}),
    (SmolLM3Config, {"no_rope_layer_interval": 2}),
    (OPTConfig, {"word_embed_proj_dim": 64, "ffn_dim": 128, "init_std": 0.15}),
    (Lfm2Config, {"layer_types": ["conv", "full_attention"]}),
]


def network(kind: type[PretrainedConfig] = LlamaConfig, **values):
    """Build a model that, left to itself, writes letters, which its tokenizer reads as the tokens they were."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**(SMALL | values)), dtype=torch.float32).eval()
    others = torch.ones(SMALL["vocab_size"], dtype=torch.bool)
    others[tiny.byte_tokenizer().encode("abcdefgh")] = False
    model.lm_head.weight.data[others] *= 0.1
    return model


def request(context: str, continuation: str, document: int) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0, ("made_up", document, 1))


def lm_evals_own(model, tokenizer) -> HFLM:
    options: dict[str, Any] = {"pretrained": model, "tokenizer": copy.deepcopy(tokenizer), "batch_size": 1}
    return HFLM(**options)


def oracle(model, tokenizer, requests) -> list[tuple[float, bool]]:
    """Ask lm-eval's own class, one sequence at a time."""
    with quiet():
        return lm_evals_own(model, tokenizer).loglikelihood(requests)


def ask(model, tokenizer, requests, batch_size: int = 8) -> list[tuple[float, bool]]:
    return LikelihoodModel(model, tokenizer, batch_size).loglikelihood(requests)


def assert_equal(found, expected) -> None:
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5, abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def questions_of(model, tokenizer, count: int = 6) -> list[Instance]:
    """Make questions with two to four choices; the first choice of every other one is what the model would write."""
    letters, made = random.Random(0), []
    for document in range(count):
        context = "".join(letters.choices("abcdefgh ", k=letters.randint(5, 60))) + "?"
        choices = ["".join(letters.choices(" abcd", k=letters.randint(1, 20))) + "." for _ in range(document % 3 + 2)]
        if document % 2:
            ids = torch.tensor([tokenizer.encode(context)])
            written = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
            choices[0] = tokenizer.decode(written)
        made += [request(context, choice, document) for choice in choices]
    return made


@pytest.mark.parametrize(("kind", "values"), FAMILIES)
def test_families_of_models_agree_with_lm_eval(tokenizer, kind, values):
    model = network(kind, **values)
    requests = questions_of(model, tokenizer)
    expected = oracle(model, tokenizer, requests)
    assert {greedy for _, greedy in expected} == {True, False}
    for batch_size in (1, 3, 16):
        assert_equal(ask(model, tokenizer, requests, batch_size), expected)


def with_bos():
    """Make a tokenizer that puts <|im_start|> before every text, as many models' tokenizers do."""
    made = tiny.byte_tokenizer()
    made.bos_token = "<|im_start|>"
    bos = ("<|im_start|>", made.bos_token_id)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[bos])
    return made


PAIRS = [
    ("a question", " and its answer"),
    ("spaces that end the context   ", "belong to the answer"),
    ("a line that ends\n", "b"),
    ("", "no context"),
    ("<|im_start|>the text brings its own beginning", " b"),
    ("", "<|im_start|>so does this"),
    ("", "<|im_end|>and this"),
]


@pytest.mark.parametrize("make", [tiny.byte_tokenizer, with_bos])
def test_texts_become_the_tokens_that_lm_eval_makes_of_them(make):
    model, tokenizer = network(), make()
    requests = [request(*pair, document) for document, pair in enumerate(PAIRS)]
    assert_equal(ask(model, tokenizer, requests), oracle(model, tokenizer, requests))


def test_contexts_that_are_too_long_lose_their_beginning_as_in_lm_eval(tokenizer):
    model = network(max_position_embeddings=24)
    contexts = ["a context of many more than 24 tokens", "of twenty-three tokens."]
    choices = ["a", "bcde", "fghijklmnopqrstu", "just twenty-four tokens."]
    requests = [request(context, choice, i) for i, context in enumerate(contexts) for choice in choices]
    assert_equal(ask(model, tokenizer, requests), oracle(model, tokenizer, requests))


@pytest.mark.parametrize(
    ("context", "choice", "counts"), [("a", "", (1, 0)), ("a", "b" * 25, (1, 25)), ("  ", "b", (0, 3))]
)
def test_choices_that_cannot_be_scored_are_refused(tokenizer, context, choice, counts):
    encoder = Encoder(tokenizer, 24)
    with pytest.raises(
        DataError, match=r"'made_up', document 7: a context of {} tokens and a choice of {};".format(*counts)
    ):
        encoder.answer(0, request(context, choice, 7))


def test_a_tokenizer_without_a_first_token_is_refused(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(ModelError, match="neither a bos nor an eos token"):
        Encoder(bare, 24)


def test_logits_that_are_more_than_the_head_are_refused(tokenizer):
    model = network(Gemma2Config, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=2.0)
    with pytest.raises(ModelError, match="after the output head"):
        LikelihoodModel(model, tokenizer, 8)


def test_tasks_that_generate_are_refused_by_name(teacher_fp32, tokenizer):
    with pytest.raises(DataError, match="task made_up asks for more than log-likelihoods"):
        LikelihoodModel(teacher_fp32, tokenizer, 8).generate_until([request("a", "b", 0)])


CONTEXT = 24
PACKABLE = [
    (kind, values) for kind, values in FAMILIES if kind is not Lfm2Config and "attn_implementation" not in values
]


def texts_of(*lengths: int) -> list[Instance]:
    """Make documents of so many letters, which are as many tokens."""
    letters = random.Random(0)
    made = ["".join(letters.choices("abcdefgh ", k=length)) for length in lengths]
    return [Instance("loglikelihood_rolling", {}, (text,), 0, ("texts", i, 1)) for i, text in enumerate(made)]


@pytest.mark.parametrize("make", [tiny.byte_tokenizer, with_bos])
@pytest.mark.parametrize(("kind", "values"), PACKABLE)
def test_whole_documents_agree_with_lm_eval_also_beyond_the_context(kind, values, make):
    model, tokenizer = network(kind, max_position_embeddings=CONTEXT, **values), make()
    edges = (CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT - 1, 2 * CONTEXT, 2 * CONTEXT + 1)
    requests = texts_of(1, 7, *edges, 5 * CONTEXT + 3, 0, 12)
    with quiet():
        expected = lm_evals_own(model, tokenizer).loglikelihood_rolling(requests)
    for batch_size in (1, 3, 16):
        found = LikelihoodModel(model, tokenizer, batch_size).loglikelihood_rolling(requests)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_whole_documents_are_read_end_to_end_in_passes_of_bounded_length(monkeypatch, teacher_fp32, tokenizer):
    monkeypatch.setattr("kdctl.eval.likelihood.PACKED", 40)
    read, run = [], teacher_fp32.model.forward
    monkeypatch.setattr(
        teacher_fp32.model, "forward", lambda **given: read.append(given["input_ids"].shape) or run(**given)
    )
    lm = LikelihoodModel(teacher_fp32, tokenizer, 3)
    read.clear()
    lm.loglikelihood_rolling(texts_of(10, 20, 11, 5, 5, 5, 5, 50))
    assert read == [(1, 30), (1, 21), (1, 10), (1, 50)]


def test_every_document_is_offered_to_the_hook_once_in_order(teacher_fp32, tokenizer):
    offered = []
    model, requests = LikelihoodModel(teacher_fp32, tokenizer, 2), texts_of(5, 0, 2500, 3, 4, 0)
    model.cache_hook.add_partial = lambda attr, req, res: offered.append((attr, req, res))
    results = model.loglikelihood_rolling(requests)
    assert offered == [
        ("loglikelihood_rolling", each.args, value) for each, value in zip(requests, results, strict=True)
    ]


def test_a_document_beyond_the_reach_is_refused_by_name(tokenizer):
    encoder = Encoder(tokenizer, 100, Reach(20, "beyond 20 tokens it is another network"))
    short, long = texts_of(20, 21)
    assert [window.scored for window in encoder.windows(0, short)] == [20]
    with pytest.raises(DataError, match=r"'texts', document 1: 21 tokens, and beyond 20 .*; take the task out"):
        list(encoder.windows(1, long))


def test_equal_requests_get_equal_answers_whatever_their_order(teacher_fp32, tokenizer):
    requests = questions_of(teacher_fp32, tokenizer)
    first = ask(teacher_fp32, tokenizer, requests)
    assert ask(teacher_fp32, tokenizer, requests) == first
    order = random.Random(1).sample(range(len(requests)), len(requests))
    assert_equal(ask(teacher_fp32, tokenizer, [requests[i] for i in order]), [first[i] for i in order])
    assert_equal(ask(teacher_fp32, tokenizer, requests + requests), first + first)


def test_every_answer_is_offered_to_the_hook_once(teacher_fp32, tokenizer):
    offered = []
    model = LikelihoodModel(teacher_fp32, tokenizer, 3)
    model.cache_hook.add_partial = lambda attr, req, res: offered.append((attr, req, res))
    requests = questions_of(teacher_fp32, tokenizer)
    results = model.loglikelihood(requests)
    expected = [("loglikelihood", each.args, result) for each, result in zip(requests, results, strict=True)]
    assert sorted(offered) == sorted(expected)


def test_what_choices_have_in_common_is_read_once(monkeypatch, teacher_fp32, tokenizer):
    read = []
    run = teacher_fp32.model.forward
    monkeypatch.setattr(
        teacher_fp32.model, "forward", lambda **given: read.append(given["input_ids"].shape) or run(**given)
    )
    lm = LikelihoodModel(teacher_fp32, tokenizer, 8)
    read.clear()
    lm.loglikelihood([request("a question", choice, 0) for choice in ("xay", "xaz", "xb")])
    lm.loglikelihood([request("a question", f" {letter}", 0) for letter in "ABCD"])
    assert read == [(1, 11), (3, 1), (1, 11)]


def test_questions_hold_answers_of_one_document_that_begin_alike(tokenizer):
    encoder = Encoder(tokenizer, 100)
    pairs = [("ab", "cd", 0), ("ab", "ce", 0), ("xb", "cd", 0), ("ab", "cd", 1), ("ab", "f", 0)]
    answers = [encoder.answer(i, request(*pair)) for i, pair in enumerate(pairs)]
    found = [([answer.index for answer in q.answers], tokenizer.decode(q.prefix)) for q in questions(answers, 8)]
    assert found == [([0, 1, 4], "ab"), ([2], "xbc"), ([3], "abc")]
    assert [[a.index for a in q.answers] for q in questions(answers, 2)] == [[0, 1], [4], [2], [3]]


def test_batches_are_small_and_of_like_lengths():
    lengths = random.Random(0).choices(range(40), k=200)
    made = list(batches(lengths, 8, int))
    assert [length for batch in made for length in batch] == sorted(lengths, reverse=True)
    assert all(len(batch) <= 8 and max(batch) * len(batch) - sum(batch) <= PADDING for batch in made)
    assert list(batches([], 8, int)) == []
