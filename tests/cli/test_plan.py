"""``kdctl plan`` on the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdctl.cli.app import app


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(*arguments: str):
    """Run the command."""
    return CliRunner().invoke(app, ["plan", *arguments])


def test_a_plan_is_made_without_weights_and_leaves_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "config only"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_dir / "config.json").read_bytes())
    done = plan("smoke", "--set", f"teacher.model={folder}")
    assert done.exit_code == 0, done.output
    assert "memory, training" in done.output
    assert "fits" in done.output
    assert not (tmp_path / "runs").exists()


def test_json_has_every_number(tiny_dir: Path) -> None:
    found = json.loads(plan("smoke", "--set", f"teacher.model={tiny_dir}", "--json").stdout)
    assert [phase["name"] for phase in found["phases"]] == ["generating", "quantizing", "training", "writing a student"]
    assert found["memory"]["needed_bytes"] == max(phase["peak_bytes"] for phase in found["phases"])


def test_memory_plans_for_another_machine(tiny_dir: Path) -> None:
    common = ("smoke", "--set", f"teacher.model={tiny_dir}")
    assert "GPU memory" in plan(*common, "--memory", "24").output
    assert "0.25 GiB there: does NOT fit" in plan(*common, "--memory", "0.25").output
    assert "RAM" in plan(*common, "--memory", "24", "--set", "runtime.device=cpu").output


def test_a_hub_model_that_is_not_here_is_a_clear_error() -> None:
    done = plan("onpolicy", "--set", "runtime.offline=true")
    assert done.exit_code == 2
    assert "Qwen/Qwen3-4B-Instruct-2507" in done.output
    assert "offline" in done.output


def test_a_grid_that_does_not_fit_is_refused(tiny_dir: Path) -> None:
    done = plan("smoke", "--set", f"teacher.model={tiny_dir}", "--set", "quantize.group_size=48")
    assert done.exit_code == 2
    assert "quantize.group_size=48" in done.output


def test_shards_plan_for_one_of_several_processes(tiny_dir: Path) -> None:
    common = ("smoke", "--set", f"teacher.model={tiny_dir}")
    found = [json.loads(plan(*common, "--shards", str(count), "--json").stdout) for count in (1, 2)]
    training = [phase["peak_bytes"] for each in found for phase in each["phases"] if phase["name"] == "training"]
    assert training[1] < training[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shards", "3"), "cannot be divided evenly among 3 processes"),
        (("--shards", "2", "--set", "distill.optimizer=adafactor"), "distill.optimizer=adafactor needs them whole"),
        (("--shards", "0"), "--shards"),
    ],
)
def test_shards_that_cannot_train_are_refused(tiny_dir: Path, arguments: tuple[str, ...], words: str) -> None:
    done = plan("smoke", "--set", f"teacher.model={tiny_dir}", *arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.output.replace("│", " ").split())


RATES = {
    "name": "a machine",
    "measured": True,
    "products_per_s": 1e12,
    "reached": 0.5,
    "memory_bytes_per_s": 1e11,
    "operator_s": 1e-5,
    "network_bytes_per_s": 1e10,
    "disk_bytes_per_s": 1e9,
}


def test_seconds_by_a_vendors_figures_say_that_they_are(tiny_dir: Path) -> None:
    common = ("smoke", "--set", f"teacher.model={tiny_dir}", "--gpu", "h100")
    found = json.loads(plan(*common, "--json").stdout)
    timing = found["timing"]
    assert timing["total_s"] == pytest.approx(sum(each["seconds_s"] for each in timing["stretches"]))
    assert all(each["seconds_s"] > 0 and each["limit"] in each["parts_s"] for each in timing["stretches"])
    assert {"generating", "quantizing", "training", "writing"} <= {each["name"] for each in timing["stretches"]}
    assert not timing["rates"]["measured"]
    assert found["memory"]["there_bytes"] == 79 * 2**30
    printed = " ".join(plan(*common).output.split())
    assert "rates of h100, NOT measured" in printed
    assert "limit" in printed


def test_measured_rates_come_from_a_file_and_figures_replace_a_vendors(tiny_dir: Path, tmp_path: Path) -> None:
    common = ("smoke", "--set", f"teacher.model={tiny_dir}")
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    assert "rates of a machine, measured:" in plan(*common, "--rates", "rates.json").output
    own = json.loads(plan(*common, "--gpu", "h100", "--tflops", "100", "--link", "7", "--json").stdout)["timing"][
        "rates"
    ]
    assert (own["products_per_s"], own["network_bytes_per_s"], own["memory_bytes_per_s"]) == (1e14, 7e9, 3.35e12)
    assert "timing" in (alone := json.loads(plan(*common, "--json").stdout))
    assert alone["timing"] is None


def test_measured_steps_of_the_run_folder_are_seconds_too(tiny_dir: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "run" / "distill" / "some" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("".join(json.dumps({"step": step, "time/step_s": 2.0 * step}) + "\n" for step in (1, 2)))
    common = ("smoke", "--set", f"teacher.model={tiny_dir}", "--run", str(tmp_path / "run"))
    done = plan(*common)
    assert done.exit_code == 0, done.output
    assert "measured here" in done.output
    assert "18 s" in done.output  # six steps of three seconds
    elsewhere = json.loads(plan(*common, "--gpu", "h100", "--json").stdout)["timing"]
    assert all(each["limit"] != "measured" for each in elsewhere["stretches"])
    assert json.loads(plan(*common, "--copies", "2", "--json").stdout)["timing"] is None


def test_copies_divide_the_rows_of_a_step(tiny_dir: Path) -> None:
    common = ("smoke", "--set", f"teacher.model={tiny_dir}", "--tflops", "1e-5", "--bandwidth", "1e6")
    one, two = (json.loads(plan(*common, "--copies", count, "--json").stdout)["timing"] for count in ("1", "2"))
    assert 1.5 < one["step_s"] / two["step_s"] <= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "h10"), "no such accelerator in kdctl's table (did you mean 'h100'?)"),
        (("--tflops", "-5", "--bandwidth", "100"), "--tflops"),
        (("--tflops", "inf", "--bandwidth", "100"), "no machine has these rates"),
        (("--tflops", "5"), "name both"),
        (("--rates", "none.json"), "cannot be read"),
        (("--rates", "negative.json"), "products_per_s"),
        (("--rates", "good.json", "--gpu", "h100"), "leave out --gpu"),
        (("--shards", "2", "--copies", "3"), "cannot be divided evenly among 6 processes"),
        (("--copies", "3"), "cannot be divided evenly among 3 processes"),
    ],
)
def test_rates_that_no_machine_has_are_refused(
    tiny_dir: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "good.json").write_text(json.dumps(RATES))
    (tmp_path / "negative.json").write_text(json.dumps(RATES | {"products_per_s": -1.0}))
    done = plan("smoke", "--set", f"teacher.model={tiny_dir}", *arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.output.replace("│", " ").split())
