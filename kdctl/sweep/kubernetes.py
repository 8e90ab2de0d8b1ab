"""A sweep as a Kubernetes Job: one pod a shard, one shared volume for run folder and caches."""

import posixpath
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdctl.base.errors import PresetError
from kdctl.base.stopping import LATER
from kdctl.base.version import __version__

CONTAINER = "kdctl"
WORK, CACHE = "/work", "/cache"
RUNS = f"{WORK}/runs"
RETRIES = 6  # for about ten minutes: a volume's server may keep the locks of a pod that died for one or two
PREEMPTED = (LATER, 128 + signal.SIGTERM)
"""Exit codes of a pod that was asked to go: in training, and elsewhere."""
Manifest = dict[str, Any]


class PodSettings(BaseModel):
    """What a pod is given; ``--pod key=value``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    image: str = f"kdctl:{__version__}"
    """Image made from the Dockerfile."""
    gpus: Annotated[int, Field(ge=0)] = 1
    """GPUs of a pod."""
    cpus: Annotated[int, Field(ge=1)] = 8
    """CPU cores of a pod."""
    memory: Annotated[str, Field(pattern=r"^\d+(\.\d+)?([KMGT]i?)?$")] = "64Gi"
    """Memory of a pod."""
    grace: Annotated[int, Field(ge=1)] = 300
    """Seconds that a pod which has to go is left: a step and the writing of a checkpoint must fit."""
    claim: str = "kdctl"
    """PersistentVolumeClaim, ReadWriteMany, that all pods mount."""
    secret: str = "kdctl"
    """Secret whose keys become environment variables: HF_TOKEN, WANDB_API_KEY. It may be missing."""


@dataclass(frozen=True)
class Fleet:
    """One Job: its name, the shell command of a pod, how many pods, and text files, by name, that the command reads.

    Pods find a file where its name says, seen from their working folder, so that the command is the same as here.
    """

    name: str
    command: str
    pods: int
    files: Mapping[str, str]


def parse_pod(assignments: Iterable[str]) -> PodSettings:
    """Read ``key=value`` texts. Raises PresetError for an unknown key or an invalid value."""
    pairs = {key: value for key, _, value in (text.partition("=") for text in assignments)}
    try:
        return PodSettings.model_validate(pairs)
    except ValidationError as error:
        found = "; ".join(
            f"--pod {item['loc'][0]}={pairs.get(str(item['loc'][0]))}: {item['msg']}" for item in error.errors()
        )
        raise PresetError(f"{found}; there are {', '.join(PodSettings.model_fields)}") from None


def _key(index: int, name: str) -> str:
    """Name a file in a ConfigMap."""
    return f"{index}-" + re.sub(r"[^-.\w]", "-", PurePosixPath(name).name, flags=re.ASCII)


def pod_folder(folder: PurePosixPath) -> str:
    """Return the run folder's name in a pod. Raises PresetError if it is not on the shared volume."""
    full = PurePosixPath(WORK) / folder
    if ".." in full.parts or not full.is_relative_to(RUNS) or str(full) == RUNS:
        raise PresetError(f"--run {folder} is not on the pods' volume, which is {RUNS}; use runs/NAME")
    return str(full.relative_to(WORK))


def shard_command(words: Sequence[str], pods: int) -> str:
    """Return the shell command of a pod that runs its shard; Kubernetes sets the index."""
    return f'exec {shlex.join(["kdctl", *words])} --shard "$JOB_COMPLETION_INDEX/{pods}"'


def agent_command(sweep_id: str) -> str:
    """Return the shell command of a pod that runs a wandb agent."""
    return f"exec {shlex.join(['wandb', 'agent', sweep_id])}"


def render(fleet: Fleet, pod: PodSettings) -> str:
    """Return the manifests as YAML."""
    return yaml.safe_dump_all(manifests(fleet, pod), sort_keys=False, width=120)


def manifests(fleet: Fleet, pod: PodSettings) -> list[Manifest]:
    """Describe a Job, and the ConfigMap with its files where it has some."""
    name = object_name(fleet.name)
    labels = {"app.kubernetes.io/name": "kdctl", "app.kubernetes.io/instance": name}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "completionMode": "Indexed",
            "completions": fleet.pods,
            "parallelism": fleet.pods,
            "backoffLimitPerIndex": RETRIES,
            "podFailurePolicy": {"rules": _not_counted()},
            "template": {"metadata": {"labels": dict(labels)}, "spec": _pod(fleet, pod, name)},
        },
    }
    if not fleet.files:
        return [job]
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": dict(labels)}}
    data = {_key(index, name): text for index, (name, text) in enumerate(fleet.files.items())}
    return [{**config, "data": data}, job]


def _not_counted() -> list[Manifest]:
    """Describe the ends of a pod that use up no retry: it was preempted, or its node is drained or gone."""
    codes = {"containerName": CONTAINER, "operator": "In", "values": [int(code) for code in PREEMPTED]}
    return [
        {"action": "Ignore", "onExitCodes": codes},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def object_name(name: str) -> str:
    """Turn a sweep's name into a Kubernetes object's."""
    return "kdctl-" + re.sub(r"[^a-z0-9]+", "-", name.lower())[:50].strip("-")


def _pod(fleet: Fleet, pod: PodSettings, name: str) -> Manifest:
    """Describe a pod: not root, no service account, volumes for runs, caches and files."""
    volumes: list[Manifest] = [{"name": "data", "persistentVolumeClaim": {"claimName": pod.claim}}]
    if fleet.files:
        volumes.append({"name": "files", "configMap": {"name": name}})
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": pod.grace,
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
        "containers": [_container(fleet, pod)],
        "volumes": volumes,
    }


def _container(fleet: Fleet, pod: PodSettings) -> Manifest:
    """Describe the container; limits equal requests, so that a pod is not the first to be evicted."""
    amounts: Manifest = {"cpu": str(pod.cpus), "memory": pod.memory}
    if pod.gpus:
        amounts["nvidia.com/gpu"] = str(pod.gpus)
    mounts: list[Manifest] = [
        {"name": "data", "mountPath": RUNS, "subPath": "runs"},
        {"name": "data", "mountPath": CACHE, "subPath": "cache"},
    ]
    for index, name in enumerate(fleet.files):
        place = posixpath.normpath(posixpath.join(WORK, name))
        mounts.append({"name": "files", "mountPath": place, "subPath": _key(index, name), "readOnly": True})
    places = {"HOME": CACHE, "HF_HOME": f"{CACHE}/huggingface", "KDCTL_CACHE": f"{CACHE}/kdctl", "WANDB_DIR": CACHE}
    return {
        "name": CONTAINER,
        "image": pod.image,
        "workingDir": WORK,
        "command": ["/bin/sh", "-c", fleet.command],
        "env": [{"name": key, "value": value} for key, value in places.items()],
        "envFrom": [{"secretRef": {"name": pod.secret, "optional": True}}],
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "volumeMounts": mounts,
    }


def apply(text: str) -> str:
    """Hand manifests to the cluster that kubectl points at and return what it says.

    Raises PresetError if there is no kubectl, or if it refuses.
    """
    if shutil.which("kubectl") is None:
        raise PresetError("--apply needs kubectl, which is not on PATH; without --apply the manifests are printed")
    done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PresetError(f"kubectl apply failed, nothing runs: {' '.join(done.stderr.split())}")
    return done.stdout
