"""The wheel: everything that the source tree needs is in it, and it works from elsewhere."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from kdctl.config.resolve import load_preset, preset_names
from kdctl.run.record_files import read_record
from kdctl.run.records import QuantizeReport
from kdctl.sweep.space import sweep_names

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from the unpacked sdist, without network, with the backend that is installed."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """Find the wheel."""
    (path,) = dist.glob("kdctl-*.whl")
    return path


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder of its own."""
    folder = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def installed(target: Path, folder: Path, *arguments: object) -> str:
    """Run Python with the installed package, in a folder outside the source tree, and return its output."""
    command = [sys.executable, "-P", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def source_files() -> set[str]:
    """List what the package consists of, by its path in the wheel."""
    package = {path for path in (ROOT / "kdctl").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    names = {str(path.relative_to(ROOT)) for path in package}
    sweeps = {f"kdctl/presets/sweeps/{name}.yaml" for name in sweep_names()}
    return names | sweeps | {f"kdctl/presets/{name}.toml" for name in preset_names()}


def test_the_wheel_holds_every_file_and_no_other(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == source_files()
    for part in (
        "presets/smoke.toml",
        "data/prompts.jsonl",
        "data/tiny/model.safetensors",
        "eval/task_files/mmlu_offline.yaml",
    ):
        assert f"kdctl/{part}" in names


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone to compare with")
def test_the_sdist_holds_what_a_clone_does(dist: Path) -> None:
    (path,) = dist.glob("kdctl-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in listed if not name.startswith(".")} <= names


def test_what_runs_is_the_installed_package(target: Path, tmp_path: Path) -> None:
    assert (
        Path(installed(target, tmp_path, "-c", "import kdctl; print(kdctl.__file__, end='')")).parent
        == target / "kdctl"
    )
    code = "from kdctl.config.resolve import presets_dir; print(presets_dir(), end='')"
    assert Path(installed(target, tmp_path, "-c", code)) == target / "kdctl" / "presets"


def test_presets_come_with_it(target: Path, tmp_path: Path) -> None:
    listed = installed(target, tmp_path, "-m", "kdctl", "presets")
    for name in preset_names():
        assert name in listed
        shown = installed(target, tmp_path, "-m", "kdctl", "presets", name)
        assert shown == load_preset(name).model_dump_json(indent=2) + "\n"


def test_the_command_is_installed_too(target: Path, tmp_path: Path) -> None:
    assert "quickstart" in installed(target, tmp_path, target / "bin" / "kdctl", "presets")


def test_it_quantizes_its_own_tiny_model(target: Path, tmp_path: Path) -> None:
    installed(target, tmp_path, "-m", "kdctl", "quantize", "--preset", "smoke", "--run", tmp_path / "run")
    report = read_record(tmp_path / "run" / "student" / "quantize.json", QuantizeReport)
    assert report.bits == 4
    assert report.student_bytes < report.teacher_bytes
    assert (tmp_path / "run" / "student" / "SHA256SUMS").is_file()


def test_its_bundled_tasks_are_found(target: Path, tmp_path: Path) -> None:
    code = (
        "from kdctl.eval.tasks import build_tasks\n"
        "from kdctl.config.preset import EvalSection\n"
        "print(*build_tasks(EvalSection(tasks=('arc_easy_offline',)), offline=True))"
    )
    assert installed(target, tmp_path, "-c", code).split() == ["arc_easy_offline"]
