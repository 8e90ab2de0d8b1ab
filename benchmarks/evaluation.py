"""Time kdctl's reading of benchmark questions, and its answers, beside lm-eval's own model class, on the same requests.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py
    python benchmarks/evaluation.py --model HuggingFaceTB/SmolLM2-135M --tasks mmlu_offline --documents 50 --rounds 5

Each round asks both, one after the other. Printed for each task: median seconds, their ratio, and on how many documents
both predict the same (by log-likelihood, and by log-likelihood per character). They may differ where batches and caches
round differently in bf16: the margin is how much likelier, in nats, lm-eval's class finds its own choice. Of a task
that generates, printed is how many answers are the same text; ``--dtype float32`` makes them all so. ``--clock cpu``
counts processor seconds of all threads, which other busy processes disturb less.
"""

import argparse
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from kdctl.config.preset import EvalSection, RolloutSection
from kdctl.config.resolve import load_preset
from kdctl.eval.answers import LiveModel
from kdctl.eval.harness import quiet
from kdctl.eval.tasks import GENERATES, build_tasks
from kdctl.model.load import load_model, pick_device
from kdctl.model.load import quiet as quiet_transformers
from kdctl.model.reference import model_folder
from kdctl.model.stops import stop_ids
from kdctl.model.tokenizer import open_tokenizer
from kdctl.rollout.engine import in_process
from kdctl.rollout.work import Work

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    preset = load_preset("quickstart")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=preset.teacher.model, help="Hub id, folder, .gguf file or pkg:PACKAGE/FILE")
    parser.add_argument("--tasks", nargs="+", default=["arc_easy_offline", "hellaswag_offline"])
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=preset.eval.batch_size)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    return parser.parse_args()


def contestants(reference: str, batch_size: int, dtype: torch.dtype) -> dict[str, LM]:
    """Wrap one model in both classes."""
    folder = model_folder(reference, dtype)
    model = load_model(folder, dtype, pick_device("auto"))
    tokenizer = open_tokenizer(folder)
    stop = stop_ids(folder, tokenizer, model.config.get_text_config().vocab_size)
    engine = in_process(Work(model, stop, "student", RolloutSection(batch_size=batch_size)))
    options: dict[str, Any] = {
        "pretrained": model,
        "tokenizer": copy.deepcopy(tokenizer),
        "batch_size": batch_size,
        "softmax_dtype": "float32",
    }
    own = LiveModel(model, tokenizer, engine, EvalSection(batch_size=batch_size))
    return {"lm-eval": HFLM(**options), "kdctl": own}


def seconds_and_values(lm: LM, task: ConfigurableTask, clock: Callable[[], float]) -> tuple[float, list[Any]]:
    """Ask one class everything, with lm-eval's progress bars out of sight."""
    started = clock()
    with redirect_stderr(StringIO()):
        if task.OUTPUT_TYPE == GENERATES:
            texts = lm.generate_until(task.instances)
            return clock() - started, texts
        results = lm.loglikelihood(task.instances)
    return clock() - started, [value for value, _ in results]


def compare(task: ConfigurableTask, values: dict[str, list[Any]]) -> tuple[int, int, list[float]]:
    """Count predictions, and those that are equal; list lm-eval's margin, in nats, where they are not."""
    if task.OUTPUT_TYPE == GENERATES:
        return len(values["kdctl"]), sum(a == b for a, b in zip(values["kdctl"], values["lm-eval"], strict=True)), []
    places = defaultdict(list)
    for place, instance in enumerate(task.instances):
        places[instance.doc_id].append(place)
    equal, margins = 0, []
    for document, own in places.items():
        lengths = [len(choice) for choice in task.doc_to_choice(task.eval_docs[document])]
        for weights in (np.ones(len(own)), np.array(lengths)):
            theirs, mine = (np.array(values[name])[own] / weights for name in ("lm-eval", "kdctl"))
            if theirs.argmax() == mine.argmax():
                equal += 1
            else:
                margins.append(float((theirs.max() - theirs[mine.argmax()]) * weights[mine.argmax()]))
    return 2 * len(places), equal, margins


def main() -> None:
    """Print one row a task."""
    given = arguments()
    quiet_transformers()
    with quiet():
        tasks = build_tasks(EvalSection(tasks=tuple(given.tasks)), offline=False)
        both = contestants(given.model, given.batch_size, getattr(torch, given.dtype))
    print(f"{'task':24} {'lm-eval s':>10} {'kdctl s':>10} {'ratio':>7} {'same predictions':>18}   margins where not")
    for name, task in ((name, task) for loaded in tasks.values() for name, task in loaded.subtasks.items()):
        seconds, values = defaultdict(list), {}
        with quiet():
            task.build_all_requests(limit=given.documents)
            for _ in range(given.rounds):
                for one, lm in both.items():
                    taken, values[one] = seconds_and_values(lm, task, CLOCKS[given.clock])
                    seconds[one].append(taken)
        theirs, mine = (statistics.median(seconds[one]) for one in ("lm-eval", "kdctl"))
        total, equal, margins = compare(task, values)
        same = f"{equal} of {total}"
        shown = ", ".join(f"{margin:.3f}" for margin in margins)
        print(f"{name:24} {theirs:10.2f} {mine:10.2f} {theirs / mine:7.2f} {same:>18}   {shown}", flush=True)


if __name__ == "__main__":
    main()
