"""Manifests that the official schemas accept, and a command that a pod's shell can run."""

import os
import stat
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from kdctl.base.errors import PresetError
from kdctl.sweep.kubernetes import (
    Fleet,
    PodSettings,
    agent_command,
    apply,
    manifests,
    object_name,
    parse_pod,
    pod_folder,
    render,
    shard_command,
)

NEWEST = list(dict.fromkeys(utils.major_minor(version) for version in utils.all_versions()))[-2:]
FLEET = Fleet(
    "My sweep_1", shard_command(["sweep", "sweeps/my β.yaml", "--set", "a b"], 4), 4, {"sweeps/my β.yaml": "x: 1\n"}
)


@pytest.mark.parametrize("version", NEWEST)
@pytest.mark.parametrize("fleet", [FLEET, Fleet("agents", agent_command("me/project/abc"), 2, {})])
@pytest.mark.parametrize("gpus", [0, 2])
def test_manifests_fit_the_official_schemas(version: str, fleet: Fleet, gpus: int) -> None:
    found = list(yaml.safe_load_all(render(fleet, PodSettings(gpus=gpus))))
    assert [one["kind"] for one in found] == (["ConfigMap", "Job"] if fleet.files else ["Job"])
    for one in found:
        assert kubernetes_validate.validate(one, version, strict=True)


def test_the_schemas_do_find_mistakes() -> None:
    (job,) = manifests(Fleet("a", "true", 1, {}), PodSettings())
    job["spec"]["completion"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, NEWEST[-1], strict=True)


def container(fleet: Fleet, pod: PodSettings) -> dict[str, Any]:
    """Return the pods' one container."""
    (found,) = manifests(fleet, pod)[-1]["spec"]["template"]["spec"]["containers"]
    return found


def test_every_mount_has_its_volume_and_every_file_its_key() -> None:
    config, job = manifests(FLEET, PodSettings(claim="disk"))
    volumes = {volume["name"]: volume for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container(FLEET, PodSettings())["volumeMounts"]} == set(volumes)
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == "disk"
    assert volumes["files"]["configMap"]["name"] == config["metadata"]["name"] == "kdctl-my-sweep-1"
    assert config["data"] == {"0-my--.yaml": "x: 1\n"}


def test_settings_reach_the_pod() -> None:
    pod = parse_pod(["image=here/kdctl:1", "gpus=2", "cpus=4", "memory=32Gi", "secret=tokens"])
    found = container(FLEET, pod)
    assert found["image"] == "here/kdctl:1"
    assert found["resources"]["limits"] == {"cpu": "4", "memory": "32Gi", "nvidia.com/gpu": "2"}
    assert found["envFrom"] == [{"secretRef": {"name": "tokens", "optional": True}}]
    assert "nvidia.com/gpu" not in container(FLEET, parse_pod(["gpus=0"]))["resources"]["limits"]


def test_a_pod_that_is_preempted_has_time_and_uses_up_no_retry() -> None:
    spec = manifests(FLEET, parse_pod(["grace=600"]))[-1]["spec"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 600
    codes, condition = spec["podFailurePolicy"]["rules"]
    assert codes["action"] == condition["action"] == "Ignore"
    assert codes["onExitCodes"]["values"] == [75, 143]
    assert codes["onExitCodes"]["containerName"] == container(FLEET, PodSettings())["name"]
    assert condition["onPodConditions"][0]["type"] == "DisruptionTarget"


def test_a_pods_shell_runs_its_own_shard(tmp_path: Path) -> None:
    fake = tmp_path / "kdctl"
    fake.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "3"}
    done = subprocess.run(container(FLEET, PodSettings())["command"], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["sweep", "sweeps/my β.yaml", "--set", "a b", "--shard", "3/4"]


@pytest.mark.parametrize(
    ("text", "part"),
    [("gpu=2", "gpu=2"), ("gpus=two", "gpus=two"), ("gpus=-1", "gpus=-1"), ("memory=lots", "memory=lots")],
)
def test_a_pod_that_makes_no_sense_is_refused(text: str, part: str) -> None:
    with pytest.raises(PresetError, match="image, gpus, cpus, memory, grace, claim, secret") as caught:
        parse_pod([text])
    assert part in str(caught.value)


@pytest.mark.parametrize("folder", ["/tmp/run", "run", "runs", "runs/../x"])
def test_a_folder_that_is_not_on_the_volume_is_refused(folder: str) -> None:
    with pytest.raises(PresetError, match="use runs/NAME"):
        pod_folder(PurePosixPath(folder))


def test_a_folder_on_the_volume_keeps_its_name() -> None:
    assert pod_folder(PurePosixPath("runs/a")) == pod_folder(PurePosixPath("/work/runs/a")) == "runs/a"


@pytest.mark.parametrize(
    ("name", "place"), [("a/x.yaml", "/work/a/x.yaml"), ("/home/me/x.yaml",) * 2, ("../x.yaml", "/x.yaml")]
)
def test_a_file_lies_where_the_command_reads_it(name: str, place: str) -> None:
    mounts = container(Fleet("a", "true", 1, {"y.toml": "", name: ""}), PodSettings())["volumeMounts"]
    assert mounts[-1] == {"name": "files", "mountPath": place, "subPath": "1-x.yaml", "readOnly": True}


def test_an_object_has_a_name_that_kubernetes_allows() -> None:
    assert object_name("Ä_lr!") == "kdctl-lr"


def test_applying_without_kubectl_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PresetError, match="kubectl"):
        apply("x")


def test_manifests_go_to_kubectl_and_its_refusal_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "kubectl"
    fake.write_text(
        f'#!/bin/sh\necho "$@"\ncat > {tmp_path}/got\n[ -s {tmp_path}/got ] || {{ echo "no\nway" >&2; exit 1; }}\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    text = render(FLEET, PodSettings())
    assert apply(text) == "apply -f -\n"
    assert (tmp_path / "got").read_text() == text
    with pytest.raises(PresetError, match="no way"):
        apply("")
