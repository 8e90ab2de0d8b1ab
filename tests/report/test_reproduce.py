"""Fingerprints and commands: what is written can be typed, and names what is on disk."""

import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import typer
from made_up import answers, edit, evaluated, make_run, wrote_rollouts

from kdctl.cli.app import app
from kdctl.config.preset import DistillSection
from kdctl.config.resolve import load_preset, parse_assignments
from kdctl.report.reproduce import commands, provenance, settings
from kdctl.report.study_reader import read_study
from kdctl.report.tables import records

VARIANT = {"lmbda": 1.0, "beta": 0.5, "lr": 2e-5, "train": "lora", "replay": None}


def test_every_command_is_one_that_the_command_line_takes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run", {"v": VARIANT})
    evaluated(run, "gguf", {"alpha": answers(0.5), "beta": answers(0.5)}, reference="some where", kl=0.5)
    study = read_study([run])
    known = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    lines = commands(study, study.sources[0])
    assert [line.split()[1] for line in lines] == ["quantize", "distill", "eval", "eval", "report"]
    for line in lines:
        _, name, *arguments = shlex.split(line)
        known[name].make_context(name, list(arguments))


def test_a_variant_is_repeated_with_its_settings(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"v": VARIANT})
    wrote_rollouts(run.variant("v").rollouts, 99)
    study = read_study([run])
    words = shlex.split(next(line for line in commands(study, study.sources[0]) if "distill" in line))
    assignments = [value for option, value in pairwise(words) if option == "--set"]
    preset = load_preset(str(run.preset), parse_assignments(assignments))
    distilled = study.models[-1].distilled
    assert distilled is not None
    assert preset.distill == DistillSection.model_validate(distilled.settings)
    assert preset.rollout.max_new_tokens == 99


def test_an_evaluation_of_other_tasks_names_them(tmp_path: Path) -> None:
    study = read_study([make_run(tmp_path / "run", {})])
    assert "kdctl eval --run NEW --task alpha --task beta" in commands(study, study.sources[0])


def test_provenance_has_a_row_for_every_model(tmp_path: Path) -> None:
    study = read_study([make_run(tmp_path / "run", {"v": {}})])
    rows = records(provenance(study))
    assert [row["model"] for row in rows] == ["teacher", "ptq", "v"]
    assert rows[2]["weights"] == "v weights"
    assert settings(study, study.sources[0])[1] == "4 bits, group size 32, asymmetric, hqq"


def test_a_folder_without_a_preset_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {})
    run.preset.unlink()
    study = read_study([run])
    assert "no preset.json" in settings(study, study.sources[0])[0]
    assert commands(study, study.sources[0]) == []


def test_a_comparison_is_repeated_by_compare_and_names_no_quantization(tmp_path: Path) -> None:
    made = make_run(tmp_path, {})
    for path in (made.student, made.eval("ptq")):
        shutil.rmtree(path)
    written = {"samples": 2, "temperature": 0.7, "tokens": 3.0, "ended": 0.5, "repetition": 0.0, "seconds_s": 1.0}
    score = {"version": "1", "metric": "f1", "value": 0.5, "stderr": 0.1, "items": 4, "num_fewshot": 0, "metrics": {}}
    for name in ("teacher", "theirs"):
        evaluated(made, name, {}, reference="models/theirs" if name == "theirs" else None, limit=4)
        edit(made.eval(name) / "results.json", tasks={"squad_offline": score | {"answers": written}})
    study = read_study([made])
    (command,) = commands(study, study.sources[0])
    assert command.startswith("kdctl compare ")
    assert " models/theirs --task squad_offline --limit 4 --samples 2 --temperature 0.7 --set " in command
    assert "heldout.num_prompts=16" in command
    assert settings(study, study.sources[0])[1:] == ["tasks: squad_offline"]
