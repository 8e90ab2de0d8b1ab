"""A run that was killed goes on with the same command and leaves what an undisturbed run leaves.

Every stage is ended by SIGKILL at a moment drawn evenly from the time that it takes undisturbed, some twice or three
times, so that what recovers is killed too. What may differ is how long things took.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parts import tiny
from parts.base import draw, expect, once, shared
from parts.folders import differences, leftovers
from parts.warm import Ended, run_kdctl

SHORT, FULL = 8, 264

QUANTIZE, DISTILL = ("quantize", "--preset", "preset.json"), ("distill", "--preset", "preset.json")
ROLLOUT, EVAL = ("rollout", "--preset", "preset.json"), ("eval", "--preset", "preset.json")
STUDENT = "run/student"
SWEEP = {
    "method": "grid",
    "metric": {"name": "eval/forward_kl", "goal": "minimize"},
    "parameters": {"preset": {"value": "preset.json"}, "distill.beta": {"values": [0.0, 0.5]}},
}


@dataclass(frozen=True)
class Stage:
    """A command, and those that come before it, which are left alone."""

    command: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    runs: bool = True
    """It takes --run."""


def of(command: Sequence[str], *settings: str, before: Sequence[Sequence[str]] = ()) -> Stage:
    """Describe a stage with settings."""
    words = [word for setting in settings for word in ("--set", setting)]
    return Stage((*command, *words), tuple(map(tuple, before)))


PATIENCE = ("distill.stop_early=true", "distill.patience=1", "distill.heldout_every=1")
LIVE = ("distill.lmbda=0.5", "distill.refresh_every=2")
STAGES = {
    "quantize minmax": of(QUANTIZE),
    "replay": of(DISTILL, before=[QUANTIZE, ROLLOUT]),
    "live": of(DISTILL, *LIVE, before=[QUANTIZE]),
    "eval": of(EVAL, before=[DISTILL]),
    "export gguf": Stage(("export", STUDENT, "--to", "gguf", "--out", "run/out.gguf"), (QUANTIZE,), runs=False),
    "rollout teacher": of((*ROLLOUT, "--source", "teacher")),
    "run": Stage(("run", "preset.json")),
    "sweep": Stage(("sweep", "sweep.json"), (QUANTIZE,)),
    "quantize hqq": of(QUANTIZE, "quantize.method=hqq"),
    "quantize gptq": of(QUANTIZE, "quantize.method=gptq"),
    "quantize autoround": of(QUANTIZE, "quantize.method=autoround"),
    "quantize again": of((*QUANTIZE, "--force"), before=[QUANTIZE]),
    "compare": of((*QUANTIZE, "--compare", "minmax,hqq,gptq")),
    "rollout student": of((*ROLLOUT, "--source", "student"), before=[QUANTIZE]),
    "rollout dataset": of((*ROLLOUT, "--source", "dataset"), "prompts.train=data.jsonl", "prompts.split=train"),
    "rollout again": of((*ROLLOUT, "--source", "teacher", "--force"), before=[ROLLOUT]),
    "states": of(DISTILL, "rollout.keep_states=exact", before=[QUANTIZE]),
    "low rank": of(DISTILL, "distill.train=lora", before=[QUANTIZE, ROLLOUT]),
    "patience": of(DISTILL, *PATIENCE, before=[ROLLOUT]),
    "distill again": of((*DISTILL, "--force"), *LIVE, before=[(*DISTILL, "--set", LIVE[0], "--set", LIVE[1])]),
    "eval written": of(EVAL, "eval.student_written=true", before=[DISTILL]),
    "export dense": Stage(("export", STUDENT, "--to", "dense", "--out", "run/out"), (QUANTIZE,), runs=False),
    "export hqq": Stage(("export", STUDENT, "--to", "hqq", "--out", "run/out"), (QUANTIZE,), runs=False),
    "report": Stage(("report", "run"), (EVAL,), runs=False),
}  # fmt: skip


def run(stage: Stage, command: Sequence[str], where: Path, kill_after: float | None = None) -> Ended:
    """Run a command of a stage in a folder."""
    words = [*command, "--run", "run"] if stage.runs or command[0] not in ("export", "report") else list(command)
    return run_kdctl(words, where, kill_after=kill_after)


def undisturbed(name: str, folder: Path) -> tuple[Path, Path, float]:
    """Return the folders before and after a stage that nobody disturbs, and its seconds; they are made once."""

    def make(root: Path) -> None:
        stage, before = STAGES[name], root / "before"
        before.mkdir()
        tiny.make_model(before / "model")
        tiny.write_preset(before / "preset.json", "model")
        (before / "sweep.json").write_text(json.dumps(SWEEP))
        write_data(before / "data.jsonl")
        for command in stage.before:
            finished(run(stage, command, before))
        shutil.copytree(before, root / "after")
        ended = finished(run(stage, stage.command, root / "after"))
        (root / "seconds.json").write_text(json.dumps(ended.seconds))

    root = once(folder / name.replace(" ", "-"), make)
    return root / "before", root / "after", json.loads((root / "seconds.json").read_text())


def write_data(path: Path) -> None:
    """Write conversations with answers."""
    pairs = (
        [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": str(2 * i)}] for i in range(9)
    )
    path.write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in pairs))


def finished(ended: Ended) -> Ended:
    """Return how a run ended that must end well."""
    expect(ended.code == 0, f"exit code {ended.code}: {ended.err[-3000:]}")
    return ended


def case(seed: int, index: int, where: Path) -> str:
    """Kill one stage one to three times, finish it and compare."""
    name, generator = list(STAGES)[index % len(STAGES)], draw("killed", seed, index)
    before, after, seconds = undisturbed(name, shared(where))
    shutil.copytree(before, where, dirs_exist_ok=True)
    kills = generator.choices([1, 2, 3], [6, 3, 1])[0]
    moments = [generator.uniform(0, seconds) for _ in range(kills)]
    told = f"{name}, killed after {', '.join(f'{moment:.3f}' for moment in moments)} of {seconds:.3f} s"
    for moment in moments:
        ended = run(STAGES[name], STAGES[name].command, where, moment)
        expect(ended.code in (0, -9), f"{told}: exit code {ended.code}: {ended.err[-3000:]}")
    ended = run(STAGES[name], STAGES[name].command, where)
    expect(ended.code == 0, f"{told}: exit code {ended.code}: {ended.err[-3000:]}")
    left = leftovers(where)
    expect(not left, f"{told}: left behind: {', '.join(left)}")
    found = differences(after / "run", where / "run")
    expect(not found, f"{told}: " + "; ".join(found))
    return name
