"""lm-eval's scores, item by item, from a live model."""

import copy
import logging
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import lm_eval.tasks
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean_stderr
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

import kdctl.eval.tasks
from kdctl.base.errors import DataError
from kdctl.config.preset import EvalSection
from kdctl.eval.items import item_ids
from kdctl.eval.tasks import LoadedTask, build_tasks, score_tasks
from kdctl.run.documents import whole_bits, write_items

NAMES = ("arc_easy_offline", "arc_challenge_offline", "hellaswag_offline", "winogrande_offline", "mmlu_offline")
BUNDLED = (
    *NAMES,
    *("gsm8k_offline", "triviaqa_offline", "squad_offline", "coqa_offline", "drop_offline", "lambada_offline"),
    *("humaneval_offline", "coqa_text_offline"),
)
LIMIT = 6


def settings(*tasks: str, **fields) -> EvalSection:
    return EvalSection(tasks=tasks, limit=LIMIT, batch_size=4, **fields)


@pytest.fixture(scope="module")
def tasks():
    return build_tasks(settings(*NAMES), offline=True)


@pytest.fixture(scope="module")
def scored(random_llama, byte_tokenizer, tasks):
    return score_tasks(random_llama, byte_tokenizer, tasks, settings(*NAMES))


@pytest.fixture
def indexed(monkeypatch):
    """Index a few of lm-eval's own folders of tasks: all of them take ten seconds."""
    own = Path(lm_eval.tasks.__file__).parent
    folders = [own / name for name in ("arc", "mmlu", "gsm8k", "wikitext", "lambada")]
    manager = TaskManager(include_path=[*folders, kdctl.eval.tasks.BUNDLED], include_defaults=False)
    monkeypatch.setattr("kdctl.eval.tasks._manager", lambda names: manager)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def loglikelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Sum log-probabilities of the continuation's bytes, one sequence at a time, with no help from lm-eval."""
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    length = len(continuation.encode())
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
    return logprobs.gather(1, ids[0, 1:, None])[-length:].sum().item()


@pytest.mark.parametrize("name", ["arc_easy_offline", "hellaswag_offline", "mmlu_offline"])
def test_loglikelihoods_equal_those_computed_by_hand(scored, tasks, random_llama, byte_tokenizer, name):
    task = tasks[name].subtasks[name]
    for row in scored[1][name].slice(0, 3).to_pylist():
        doc = task.eval_docs[row["doc_index"]]
        context = (task.resolve_field(doc, task.config.description) or "") + task.doc_to_text(doc)
        choices = task.doc_to_choice(doc)
        expected = [loglikelihood(random_llama, byte_tokenizer, context, f" {choice}") for choice in choices]
        assert row["loglikelihoods"] == pytest.approx(expected, abs=1e-2, rel=1e-4)
        normalised = [value / len(choice) for value, choice in zip(row["loglikelihoods"], choices, strict=True)]
        assert row["prediction_acc"] == row["loglikelihoods"].index(max(row["loglikelihoods"]))
        assert row["prediction_acc_norm"] == normalised.index(max(normalised))
        assert row["gold"] == task.doc_to_target(doc)


def test_winogrande_scores_one_ending_after_two_contexts(scored, random_llama, byte_tokenizer, tasks):
    docs = tasks["winogrande_offline"].subtasks["winogrande_offline"].eval_docs
    for row, doc in zip(scored[1]["winogrande_offline"].to_pylist(), docs.select(range(LIMIT)), strict=True):
        before, after = doc["sentence"].split("_")
        contexts = [before + doc["option1"], before + doc["option2"]]
        expected = [loglikelihood(random_llama, byte_tokenizer, text, f" {after.strip()}") for text in contexts]
        assert row["loglikelihoods"] == pytest.approx(expected, abs=1e-2, rel=1e-4)
        assert row["gold"] == int(doc["answer"]) - 1
        assert row["acc"] == (expected.index(max(expected)) == row["gold"])
        assert row["lengths"] == [len(text) for text in contexts]


@pytest.mark.parametrize("name", NAMES)
def test_items_and_their_means_equal_those_of_lm_evals_own_model_class(
    scored, tasks, random_llama, byte_tokenizer, name
):
    scores, tables = scored
    options: dict[str, Any] = {"pretrained": random_llama, "tokenizer": copy.deepcopy(byte_tokenizer), "batch_size": 4}
    task_dict: Any = {"tasks": tasks[name].subtasks}
    results: Any = evaluate(lm=HFLM(**options), task_dict=task_dict, limit=LIMIT, log_samples=True, bootstrap_iters=0)
    raw = results["results"][name]
    columns = tables[name].to_pydict()
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in raw:
            assert sum(columns[metric]) / LIMIT == raw[f"{metric},none"] == scores[name].metrics[metric]
    lm_evals = {key.split(",")[0] for key in raw if "," in key and "stderr" not in key}
    assert scores[name].metrics.keys() == lm_evals | {"p_right"}
    for row, sample in zip(tables[name].to_pylist(), results["samples"][name], strict=True):
        assert row["loglikelihoods"] == pytest.approx([value for value, _ in sample["filtered_resps"]], rel=1e-5)
        assert {metric: row[metric] for metric in ("acc", "acc_norm") if metric in sample} == {
            metric: bool(sample[metric]) for metric in ("acc", "acc_norm") if metric in sample
        }


@pytest.mark.parametrize(
    ("name", "metric"), [*((name, "acc_norm") for name in NAMES[:3]), *((name, "acc") for name in NAMES[3:])]
)
def test_headline_is_acc_norm_where_the_task_has_it(scored, name, metric):
    score = scored[0][name]
    assert score.metric == metric
    assert score.value == score.metrics[metric]
    assert score.stderr == pytest.approx(mean_stderr(scored[1][name][metric].to_pylist()))
    assert (score.items, score.version, score.num_fewshot) == (LIMIT, "1.0", 0)


def test_rows_are_complete_and_in_order(scored):
    for name, table in scored[1].items():
        assert table.num_rows == LIMIT
        assert table["doc_index"].to_pylist() == list(range(LIMIT))
        assert set(table["task"].to_pylist()) == {name}
        assert all(column.null_count == 0 for column in table.columns)
    assert scored[1]["mmlu_offline"]["subtask"][0].as_py() == "high_school_world_history"
    assert scored[1]["arc_easy_offline"]["subtask"][0].as_py() == "arc_easy_offline"
    assert scored[1]["winogrande_offline"]["cluster"].to_pylist()[:2] == ["winogrande_offline 0"] * 2


def test_scores_are_repeatable_and_model_and_tokenizer_are_left_alone(scored, tasks, random_llama, byte_tokenizer):
    random_llama.train()
    name = "winogrande_offline"
    _, tables = score_tasks(random_llama, byte_tokenizer, {name: tasks[name]}, settings(name))
    assert tables[name].equals(scored[1][name])
    assert random_llama.training
    assert byte_tokenizer.pad_token is None


def test_group_pools_the_items_of_its_subtasks(tasks, random_llama, byte_tokenizer):
    parts = {name: tasks[name].subtasks[name] for name in ("arc_easy_offline", "winogrande_offline")}
    seen = []
    scores, tables = score_tasks(
        random_llama,
        byte_tokenizer,
        {"both": LoadedTask("both", "2", parts)},
        settings("both"),
        lambda *event: seen.append(event),
    )
    assert scores["both"].items == tables["both"].num_rows == 2 * LIMIT
    assert scores["both"].value == sum(tables["both"]["acc"].to_pylist()) / (2 * LIMIT)
    assert scores["both"].metrics.keys() == {"acc", "p_right"}
    assert set(tables["both"]["subtask"].to_pylist()) == set(parts)
    assert seen[0] == ("both", 0, 2 * LIMIT)
    assert seen[-1] == ("both", 2 * LIMIT, 2 * LIMIT)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_items_that_do_not_add_up_are_a_bug(monkeypatch, tasks, random_llama, byte_tokenizer):
    monkeypatch.setattr("kdctl.eval.tasks._mean", lambda table, column: 2.0)
    name = "winogrande_offline"
    with pytest.raises(RuntimeError, match=r"items give acc=2\.0, lm-eval"):
        score_tasks(random_llama, byte_tokenizer, {name: tasks[name]}, settings(name))


def test_item_ids_are_unique_and_stable(scored):
    for table in scored[1].values():
        ids = table["item_id"].to_pylist()
        assert len(set(ids)) == len(ids)
        assert all(len(text) == 16 and int(text, 16) >= 0 for text in ids)
    assert scored[1]["arc_easy_offline"]["item_id"][0].as_py() == "930349cf11c2a1f7"
    assert scored[1]["winogrande_offline"]["item_id"][0].as_py() == "37f76041e9b0e4d3"


def test_a_repeated_item_gets_an_id_of_its_own():
    first, other, again = item_ids(["a", "b", "a"])
    assert len({first, other, again}) == 3
    assert list(item_ids(["a", "a"])) == [first, again]


def test_nothing_is_printed_and_settings_of_other_libraries_return(capfd, tasks, random_llama, byte_tokenizer):
    level = logging.getLogger("lm_eval").level
    name = "mmlu_offline"
    build_tasks(settings(name), offline=True)
    score_tasks(random_llama, byte_tokenizer, {name: tasks[name]}, settings(name))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == level


def test_written_items_have_equal_bytes(scored, tmp_path):
    for folder in ("one", "two"):
        write_items(tmp_path / folder, scored[1])
    for name in NAMES:
        files = [tmp_path / folder / "samples" / f"{name}.parquet" for folder in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert pq.read_table(files[0]).equals(scored[1][name])
    assert len(list((tmp_path / "one" / "samples").iterdir())) == len(NAMES)


def test_unknown_task_is_named_with_the_nearest_one(indexed):
    with pytest.raises(DataError, match=r"unknown task 'arc_esy' \(did you mean 'arc_easy'\?\)"):
        build_tasks(settings("arc_esy"), offline=True)


def test_an_unknown_task_near_to_none_says_where_tasks_are_listed(indexed):
    with pytest.raises(DataError, match=r"lm-eval ls tasks.*arc_easy_offline"):
        build_tasks(settings("qqqqqq"), offline=True)


def test_a_task_is_a_name_and_no_file_whose_functions_would_run(indexed, tmp_path):
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "own.yaml").write_text("task: own\noutput_type: multiple_choice\ndoc_to_text: !function own.run\n")
    for name in (tmp_path, tmp_path / "own.yaml"):
        with pytest.raises(DataError, match="unknown task"):
            build_tasks(settings(str(name)), offline=True)
    assert not (tmp_path / "ran").exists()


def test_bundled_tasks_need_no_index_of_lm_evals_own(tasks):
    manager = kdctl.eval.tasks._manager(NAMES)
    assert sorted(manager.all_tasks) == sorted(BUNDLED)


@pytest.mark.parametrize(
    ("offline", "reason"), [(True, "offline mode is on"), (False, "the Hugging Face Hub cannot be reached")]
)
def test_hub_task_without_its_data_names_the_offline_task(indexed, empty_cache, monkeypatch, offline, reason):
    monkeypatch.setattr("kdctl.eval.harness.hub_reachable", lambda: False)
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(DataError, match=f"'arc_easy' is not in the local cache and {reason}; use 'arc_easy_offline'"):
        build_tasks(settings("arc_easy"), offline=offline)
    assert huggingface_hub.constants.HF_HUB_OFFLINE is before


def test_hub_group_without_its_data_names_the_offline_task(indexed, empty_cache):
    with pytest.raises(DataError, match="use 'mmlu_offline'"):
        build_tasks(settings("mmlu"), offline=True)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"allocation": "margin"}, "eval.allocation=margin goes by how near a question's choices are"),
        ({"num_fewshot": 2}, "eval.num_fewshot=2 asks for examples"),
    ],
)
@pytest.mark.parametrize("name", ["wikitext", "coqa_text_offline"])
def test_settings_that_whole_documents_cannot_have_are_refused_before_a_download(indexed, name, fields, why):
    with pytest.raises(DataError, match=f"task '{name}' scores whole documents.*{why}"):
        build_tasks(settings("arc_easy_offline", name, **fields), offline=True)


def test_an_unknown_kind_of_task_is_refused(indexed):
    with pytest.raises(DataError, match="task 'made_up' is of kind 'pictures'"):
        kdctl.eval.tasks._check_kind("made_up", "pictures", settings())


def test_whole_documents_without_bits_per_byte_are_refused():
    task: Any = build_tasks(settings("coqa_text_offline"), offline=True)["coqa_text_offline"].subtasks
    bare = copy.copy(task["coqa_text_offline"])
    bare._aggregation_list = {"word_perplexity": len}
    with pytest.raises(DataError, match="does not report bits_per_byte"):
        kdctl.eval.tasks._check(bare, settings())


def wikitext() -> LoadedTask:
    """Build lm-eval's own task, which scores other texts than it counts, over made-up pages."""
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / "wikitext" / "wikitext.yaml")
    pages = [{"page": f" = Page {i} = \n It 's {'very ' * i}long , and 1 @,@ 000 × as old . \n"} for i in range(LIMIT)]
    rows = Dataset.from_list(pages)
    del config["dataset_path"], config["dataset_name"]
    splits = {"train": rows, "validation": rows, "test": rows}
    task = ConfigurableTask(config=config | {"custom_dataset": lambda **_: splits})
    kdctl.eval.tasks._check(task, settings())
    return LoadedTask("wikitext", str(task.VERSION), {"wikitext": task})


@pytest.mark.parametrize(("name", "column"), [("coqa_text_offline", "text"), ("wikitext", "page")])
def test_whole_documents_score_as_lm_eval_scores_them(random_llama, byte_tokenizer, name, column):
    task = wikitext() if name == "wikitext" else build_tasks(settings(name), offline=True)[name]
    scores, tables = score_tasks(random_llama, byte_tokenizer, {name: task}, settings(name))
    score, table = scores[name], tables[name]
    options: dict[str, Any] = {"pretrained": random_llama, "tokenizer": copy.deepcopy(byte_tokenizer), "batch_size": 1}
    task_dict: Any = {"tasks": task.subtasks}
    raw: Any = evaluate(lm=HFLM(**options), task_dict=task_dict, limit=LIMIT, log_samples=True, bootstrap_iters=0)
    theirs = {key.split(",")[0]: value for key, value in raw["results"][name].items() if key.endswith("y,none")}
    theirs["bits_per_byte"] = raw["results"][name]["bits_per_byte,none"]
    assert score.metrics == pytest.approx(theirs, rel=1e-5)
    assert (score.metric, score.value, score.items) == ("bits_per_byte", score.metrics["bits_per_byte"], LIMIT)
    said = [sample["filtered_resps"][0] for sample in raw["samples"][name]]
    assert table["loglikelihood"].to_pylist() == pytest.approx(said, rel=1e-5)
    texts = [sample["doc"][column] for sample in raw["samples"][name]]
    assert table["bytes"].to_pylist() == [len(text.encode()) for text in texts]
    assert table["words"].to_pylist() == [len(re.split(r"\s+", text)) for text in texts]
    costs, sizes = whole_bits(table)
    left_out = [(costs.sum() - cost) / (sizes.sum() - size) for cost, size in zip(costs, sizes, strict=True)]
    jackknife = float(np.sqrt((LIMIT - 1) * np.var(left_out)))
    assert score.stderr == pytest.approx(jackknife, rel=0.1)


def test_few_shot_is_refused_where_examples_would_be_the_questions(tasks):
    with pytest.raises(DataError, match=r"'winogrande_offline' has no examples .* eval.num_fewshot=5"):
        build_tasks(settings("winogrande_offline", num_fewshot=5), offline=True)


def test_few_shot_takes_examples_of_the_same_subject(random_llama, byte_tokenizer):
    loaded = build_tasks(settings("mmlu_offline", num_fewshot=2), offline=True)
    scores, _ = score_tasks(random_llama, byte_tokenizer, loaded, settings("mmlu_offline"))
    task: Any = loaded["mmlu_offline"].subtasks["mmlu_offline"]
    assert scores["mmlu_offline"].num_fewshot == 2
    assert task.instances[0].args[0].count("\nAnswer:") == 3
    assert task.examples["high_school_world_history"][1]["question"].strip() in task.instances[0].args[0]


def test_more_examples_than_there_are_is_refused():
    with pytest.raises(DataError, match=r"fewer examples than eval.num_fewshot=6"):
        build_tasks(settings("mmlu_offline", num_fewshot=6), offline=True)


@pytest.mark.parametrize(("weighted", "entries"), [(True, ["group"]), (False, ["arc_easy_offline", "mmlu_offline"])])
def test_group_is_one_entry_only_where_its_score_pools_items(tasks, weighted, entries):
    members = {name: tasks[name].subtasks[name] for name in ("arc_easy_offline", "mmlu_offline")}
    config = {"group": "group", "aggregate_metric_list": [{"metric": "acc", "weight_by_size": weighted}]}
    built = {"tasks": members, "groups": {"group": Group.from_config(config)}}
    assert [entry.name for entry in kdctl.eval.tasks._entries("group", built)] == entries


def test_task_files_lie_inside_the_package():
    files = {path.stem for path in kdctl.eval.tasks.BUNDLED.glob("*.yaml")}
    assert files == set(BUNDLED)
    assert Path(kdctl.eval.tasks.BUNDLED).parent == Path(kdctl.eval.tasks.__file__).parent
