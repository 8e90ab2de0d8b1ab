"""Hold what ``kdctl plan`` says of seconds against this machine: measure its rates, then do what they predict.

    python benchmarks/plan_error.py [--rounds 4]
    OMP_NUM_THREADS=1 python benchmarks/plan_error.py --processor-time    # where other work runs beside it

The quickstart's teacher, 16 sequences of the mean lengths of the study's store: a step of two micro-batches
with kept teacher states, 64 completions at once, and the teacher's states of 16 sequences. Tokens are random, and every
completion is as long as it may be. Medians, the first round left out.
"""

import argparse

import torch
from rates import Clock, measured
from step_parts import rollouts
from transformers import PreTrainedModel

from kdctl.config.preset import Preset
from kdctl.config.resolve import load_preset
from kdctl.cost.duration import Duration
from kdctl.cost.estimate import Cost
from kdctl.cost.network import look_at
from kdctl.cost.work import stretch
from kdctl.distill.divergence import Objective
from kdctl.distill.feed import Feed
from kdctl.distill.loop import Trainer
from kdctl.distill.shadow import make_shadow
from kdctl.model.activation_checkpointing import set_checkpointing
from kdctl.model.batch import collate, predicting_states
from kdctl.model.configuration import read_config
from kdctl.model.load import load_model, pick_device, quiet
from kdctl.model.reference import model_folder
from kdctl.quant.apply import build_student, quantize_layers, select_layers
from kdctl.rollout.sampler import InProcess
from kdctl.rollout.sampling import Sampling
from kdctl.run.records import Prompt, Rollout

PROMPT, NEW, ROWS, AT_ONCE = 67, 82, 16, 64


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--processor-time", action="store_true")
    return parser.parse_args()


class Kept:
    """The teacher's states of a few rollouts, in memory."""

    def __init__(self, teacher: PreTrainedModel, data: list[Rollout]):
        self._states = {one.prompt_id: predicting_states(teacher, collate([one])) for one in data}

    def of(self, rollouts: list[Rollout], _: object) -> torch.Tensor:
        """Return the states of some rollouts, (M, H)."""
        return torch.cat([self._states[one.prompt_id] for one in rollouts])


def preset() -> Preset:
    """Return the quickstart with sequences of one length, λ=1 with a refresh every four steps, and kept states."""
    lengths = {"prompts.max_prompt_tokens": PROMPT, "rollout.max_new_tokens": NEW}
    live = {"distill.lmbda": 1.0, "distill.refresh_every": AT_ONCE // ROWS, "rollout.keep_states": "exact"}
    return load_preset("quickstart", lengths | live | {"quantize.method": "minmax"})


def trainer_of(found: Preset, teacher: PreTrainedModel, data: list[Rollout]) -> Trainer:
    """Make what trains."""
    weights = quantize_layers(teacher, select_layers(teacher, found.quantize), found.quantize)
    student = build_student(teacher, weights)
    set_checkpointing(student, found.runtime.activation_checkpointing)
    shadow = make_shadow(found.distill, student, weights, teacher)
    return Trainer(teacher, student, shadow, Feed(found.distill, data), found.distill, Kept(teacher, data))  # pyright: ignore


def main() -> None:
    """Measure, predict and print."""
    args, found, device = arguments(), preset(), pick_device("auto")
    quiet()
    clock = Clock(device, args.processor_time, args.rounds)
    rates = measured(clock, 10.0)
    folder = model_folder(found.teacher.model, torch.bfloat16)
    teacher = load_model(folder, torch.bfloat16, device)
    network = look_at(read_config(folder), found.quantize, torch.bfloat16, Objective())
    works = Duration(Cost(found, network, device.type == "cpu")).works()
    data = [
        Rollout(
            str(at),
            at,
            0,
            (ids := one.prompt_ids + one.completion_ids)[:PROMPT],
            ids[PROMPT:],
            None,
            "length",
            0,
            0,
            "",
        )
        for at, one in enumerate(rollouts(ROWS, PROMPT + NEW, network.vocabulary))
    ]
    trainer, sampling = trainer_of(found, teacher, data), Sampling(1.0, 1.0, 0, NEW, NEW, 0)
    engine = InProcess(trainer.student, [0], "student", AT_ONCE)
    prompts = [Prompt(str(at), at, data[at % ROWS].prompt_ids) for at in range(AT_ONCE)]
    done = {
        "training": (clock.seconds(lambda: trainer.step(0)), found.distill.steps),
        "generating, live": (
            clock.seconds(lambda: engine.complete([(prompt, 0) for prompt in prompts], sampling)),
            found.distill.steps * ROWS / AT_ONCE,
        ),
        "keeping teacher states": (
            clock.seconds(lambda: predicting_states(teacher, collate(data))),
            found.distill.steps,
        ),
    }
    print(rates.model_dump_json(indent=2))
    print("\n| | s | by the plan | ratio |\n|---|---:|---:|---:|")
    for name, (seconds, times) in done.items():
        planned = stretch(name, works[name], rates).seconds_s / times
        print(f"| {name} | {seconds:.2f} | {planned:.2f} | {planned / seconds:.2f} |")


if __name__ == "__main__":
    main()
