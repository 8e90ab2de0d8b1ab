"""Shell and YAML that the documentation prints: all of it parses, and job files do what is said of them."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
KDCTL = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$TOLD"; exit "$CODE"'
SCONTROL = '[ "$1" = show ] && printf "%s\\n" first second || echo "$@" >> "$CALLS"'
SRUN = """
while [[ $1 == --* ]]; do shift; done
worst=0
for task in 0 1 2 3; do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 SLURM_NTASKS_PER_NODE=2 "$@"
  code=$?
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
"""
SLURM = {"SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "12345"}


def blocks(*kinds: str) -> Iterator[tuple[str, str]]:
    """Yield every printed block of some kinds, with its page."""
    for page in PAGES:
        for found in re.finditer(rf"```(?:{'|'.join(kinds)})\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            yield str(page.relative_to(ROOT)), found[1]


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """Return an environment with stand-ins for kdctl, srun and scontrol, which write down what they are told."""
    for name, text in {"kdctl": KDCTL, "scontrol": SCONTROL, "srun": SRUN}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TOLD": str(tmp_path / "told"),
        "CALLS": str(tmp_path / "calls"),
    }


def test_printed_shell_parses() -> None:
    found = list(blocks("sh", "bash"))
    assert found
    for page, text in found:
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), f"{page}: {text}"


@pytest.mark.parametrize(("code", "again"), [(0, False), (75, True), (143, True), (138, True), (2, False), (70, False)])
def test_the_job_script_tells_processes_who_they_are_and_goes_back_into_the_queue(
    code: int, again: bool, tmp_path: Path, programs: dict[str, str]
) -> None:
    ((_, script),) = blocks("bash")
    given = programs | SLURM | {"CODE": str(code)}
    done = subprocess.run(["bash", "-c", script], env=given, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    command = "4 2 first 22345 run onpolicy --run /shared/runs/onpolicy"
    told = (tmp_path / "told").read_text().splitlines()
    assert told == [f"{rank} {rank % 2} {command}" for rank in range(4)]
    assert (tmp_path / "calls").exists() == again
    assert not again or (tmp_path / "calls").read_text() == "requeue 12345\n"


def manifests() -> list[dict[str, Any]]:
    """Read every printed YAML block, and return those that are manifests."""
    found = [one for _, text in blocks("yaml") for one in yaml.safe_load_all(text)]
    return [one for one in found if "apiVersion" in one]


def test_printed_manifests_fit_the_official_schemas() -> None:
    found = manifests()
    assert [one["kind"] for one in found] == ["Service", "Job"]
    for one in found:
        assert kubernetes_validate.validate(one, utils.major_minor(utils.latest_version()), strict=True)


def test_pods_of_a_training_find_each_other_and_know_who_they_are(tmp_path: Path, programs: dict[str, str]) -> None:
    service, job = manifests()
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    told = {each["name"]: each["value"] for each in container["env"]}
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(told["WORLD_SIZE"]) == spec["completions"] == spec["parallelism"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    given = programs | told | {"JOB_COMPLETION_INDEX": "3", "CODE": "75"}
    assert subprocess.run(container["command"], env=given).returncode == 75
    expected = f"3 0 8 1 {name}-0.{name} 29500 run onpolicy --run runs/onpolicy\n"
    assert (tmp_path / "told").read_text() == expected
