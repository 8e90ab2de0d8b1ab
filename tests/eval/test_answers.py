"""Answers that a model writes: lm-eval's own, cut at the right place, drawn with numbers that models have in common."""

import copy
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from kdctl.base.errors import DataError
from kdctl.config.preset import EvalSection
from kdctl.eval.answers import AnswerWriter, Ends, repetition
from kdctl.eval.likelihood import Encoder
from kdctl.eval.offline import coqa_scores, nearest
from kdctl.eval.tasks import build_tasks, generates, score_tasks
from kdctl.rollout.sampler import InProcess

LIMIT = 6


def settings(*tasks: str, **fields) -> EvalSection:
    return EvalSection(tasks=tasks, limit=LIMIT, batch_size=4, **fields)


class Counting(InProcess):
    """Counts tokens, and like a server writes on to the end unless it listens."""

    def __init__(self, *args, listens=True):
        super().__init__(*args)
        self.listens, self.drawn = listens, 0

    def complete(self, items, sampling, policy_step=0, progress=None, finished=None, until=None):
        found = super().complete(items, sampling, policy_step, progress, finished, until if self.listens else None)
        self.drawn += sum(len(one.completion_ids) for one in found)
        return found


@pytest.fixture(scope="module")
def tasks():
    return build_tasks(settings("triviaqa_offline", "lambada_offline"), offline=True)


@pytest.fixture
def engine(random_llama, byte_tokenizer):
    return Counting(random_llama, [byte_tokenizer.eos_token_id], "student", 4)


def score(random_llama, byte_tokenizer, tasks, engine, **fields):
    return score_tasks(random_llama, byte_tokenizer, tasks, settings(*tasks, **fields), engine=engine)


def test_answers_and_scores_are_those_of_lm_evals_own_model_class(random_llama, byte_tokenizer, tasks, engine):
    scores, tables = score(random_llama, byte_tokenizer, tasks, engine)
    options: dict[str, Any] = {"pretrained": random_llama, "tokenizer": copy.deepcopy(byte_tokenizer), "batch_size": 4}
    for name, task in tasks.items():
        task_dict: Any = {"tasks": task.subtasks}
        own = HFLM(**options)
        found: Any = evaluate(lm=own, task_dict=task_dict, limit=LIMIT, log_samples=True, bootstrap_iters=0)
        rows = tables[name].to_pylist()
        metric = scores[name].metric
        assert [row["score"] for row in rows] == [float(one[metric]) for one in found["samples"][name]]
        if name == "triviaqa_offline":
            assert [row["answers"] for row in rows] == [one["resps"][0] for one in found["samples"][name]]
            assert len({row["answers"][0] for row in rows}) > 1
            assert any(row["tokens"][0] < 256 for row in rows), "some are ended by a text"


def test_an_engine_that_writes_on_gives_the_same(random_llama, byte_tokenizer, tasks, engine):
    only = {"triviaqa_offline": tasks["triviaqa_offline"]}
    deaf = Counting(random_llama, [byte_tokenizer.eos_token_id], "student", 4, listens=False)
    heard, told = score(random_llama, byte_tokenizer, only, engine), score(random_llama, byte_tokenizer, only, deaf)
    assert heard[1]["triviaqa_offline"].equals(told[1]["triviaqa_offline"])
    assert sum(x["tokens"][0] for x in heard[1]["triviaqa_offline"].to_pylist()) == engine.drawn < deaf.drawn


def test_samples_differ_come_again_and_count_by_their_mean(random_llama, byte_tokenizer, tasks, engine):
    only = {"triviaqa_offline": tasks["triviaqa_offline"]}
    first, second = (
        score_tasks(random_llama, byte_tokenizer, only, replaced(limit), engine=engine) for limit in (LIMIT, LIMIT - 2)
    )
    (scores, tables), (_, fewer) = first, second
    rows = tables["triviaqa_offline"].to_pylist()
    assert all(len(set(row["answers"])) == 3 for row in rows)
    assert [row["answers"] for row in fewer["triviaqa_offline"].to_pylist()] == [row["answers"] for row in rows[:-2]]
    assert [row["score"] for row in rows] == [pytest.approx(np.mean(row["scores"])) for row in rows]
    said = scores["triviaqa_offline"]
    assert said.answers is not None
    assert (said.answers.samples, said.items) == (3, LIMIT)
    assert said.answers.tokens == pytest.approx(np.mean([row["tokens"] for row in rows]))
    assert said.value == pytest.approx(np.mean([row["score"] for row in rows]))


def replaced(limit: int) -> EvalSection:
    return settings("triviaqa_offline", samples=3, temperature=1.0).model_copy(update={"limit": limit})


def test_only_tasks_that_generate_need_an_engine(random_llama, byte_tokenizer, tasks):
    only = {"lambada_offline": tasks["lambada_offline"]}
    assert generates(tasks)
    assert not generates(only)
    scores, tables = score_tasks(random_llama, byte_tokenizer, only, settings("lambada_offline"))
    assert scores["lambada_offline"].answers is None
    assert tables["lambada_offline"]["answers"].to_pylist() == [[]] * LIMIT


@pytest.mark.parametrize("text", ["ab\nQ: cd", "äö\nQ:", "\nQ:", "no end", "a\nQ", "é" * 9 + "\nQ: x\nQ: y"])
def test_an_answer_ends_with_the_token_that_completes_a_text(byte_tokenizer, text):
    ends, tokens = Ends(byte_tokenizer, ["\nQ:", "<eos>"]), byte_tokenizer.encode(text)
    end = next((n for n in range(1, len(tokens) + 1) if ends.reached(tokens[:n])), None)
    assert end == next((n for n in range(1, len(tokens) + 1) if "\nQ:" in byte_tokenizer.decode(tokens[:n])), None)


def test_repetition_is_the_share_of_runs_that_were_there_before():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7] * 10) == 1 - 1 / 7
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == 1 - 4 / 5


@pytest.mark.parametrize(
    ("context", "wanted", "longest", "message"),
    [
        ("Q", {"until": ["x"], "num_beams": 4}, 64, "asks generation for num_beams"),
        ("Q", {"until": ["x"], "max_gen_toks": 64}, 64, "leaves no room for a question"),
    ],
)
def test_what_cannot_be_written_is_refused(byte_tokenizer, engine, context, wanted, longest, message):
    writer = AnswerWriter(engine, Encoder(byte_tokenizer, longest), settings("made_up"))
    request = Instance("generate_until", {}, (context, wanted), 0, metadata=("made_up", 3, 1))
    with pytest.raises(DataError, match=message):
        writer.write([request], lambda _: None)


def test_a_long_context_loses_its_beginning(byte_tokenizer, engine):
    writer, seen = AnswerWriter(engine, Encoder(byte_tokenizer, 40), settings("made_up")), []
    engine.complete = lambda items, sampling, **_: seen.extend(items) or [Done([1])]
    request = Instance("generate_until", {}, ("ab" * 40, {"max_gen_toks": 10}), 0, metadata=("made_up", 3, 1))
    writer.write([request], lambda _: None)
    assert seen[0][0].prompt_ids == byte_tokenizer.encode("ab" * 15)


class Done:
    finish_reason = "length"

    def __init__(self, tokens):
        self.completion_ids = tokens


def test_samples_of_a_greedy_task_are_refused():
    with pytest.raises(DataError, match=r"eval.samples=2.*triviaqa_offline.*set eval.temperature"):
        build_tasks(settings("triviaqa_offline", samples=2), offline=True)
    with pytest.raises(ValueError, match="2 times the same answer"):
        settings("triviaqa_offline", samples=2, temperature=0.0)


def test_answers_are_compared_as_squad_compares_them():
    assert nearest(" The Eiffel tower!", ["Eiffel Tower", "tower"]) == {"exact_match": 1.0, "f1": 1.0}
    assert nearest("in Paris", ["Paris, France"]) == {"exact_match": 0.0, "f1": 0.5}
    assert nearest("the", ["a"]) == {"exact_match": 1.0, "f1": 1.0}
    assert nearest("the", ["cat"]) == {"exact_match": 0.0, "f1": 0.0}
    doc = {"golds": ["white", "white fur", "snow"]}
    assert coqa_scores(doc, [" white\nQ: and"]) == pytest.approx({"em": 2 / 3, "f1": (2 / 3 + 1 + 1) / 3})


@pytest.mark.parametrize("name", ["gsm8k_offline", "squad_offline", "coqa_offline", "drop_offline", "lambada_offline"])
def test_a_right_answer_is_worth_one(name):
    (task,) = build_tasks(settings(name), offline=True)[name].subtasks.values()
    doc = task.eval_docs[0]
    right: Any = task.doc_to_target(doc)
    if name == "lambada_offline":
        assert task.process_results(doc, [(-0.5, True)])["acc"] == 1
        return
    said = f"The answer is {right}." if name == "gsm8k_offline" else right
    request = Instance("generate_until", doc, ("", {}), 0)
    request.resps = [said]
    task._instances = [request]
    task.apply_filters()
    first = next(iter(request.filtered_resps))
    found = task.process_results(doc, [request.filtered_resps[first]])
    if name == "coqa_offline":  # one person's answer, judged by those of the others
        others = [nearest(right, [gold for gold in doc["golds"] if gold != left])["f1"] for left in doc["golds"]]
        assert found["f1"] == pytest.approx(np.mean(others))
    else:
        assert found["f1" if "f1" in found else "exact_match"] == 1


def test_upstreams_files_are_there():
    own = Path(lm_eval.tasks.__file__).parent
    assert all((own / name).is_file() for name in ("gsm8k/gsm8k-cot.yaml", "triviaqa/default.yaml"))
