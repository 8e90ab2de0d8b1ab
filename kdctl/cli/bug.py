"""The file that is left where kdctl itself is at fault: enough to find the fault by, and nothing that is private."""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from kdctl.base.errors import brief
from kdctl.base.version import __version__

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
SECRET_WORDS = re.compile(r"hf_\w{8,}|\b[0-9a-f]{40}\b|(?<=://)[^/\s@]+(?=@)")
SHORTEST_SECRET = 6


def bug_message(error: BaseException, folder: Path | None, preset: str) -> str:
    """Write the file, into the run folder or else the temporary one, and return what is said of it."""
    what = f"this is a bug in kdctl: {type(error).__name__}: {brief(error)}; "
    file = _write(bug_report(error, preset), folder)
    if file is None:
        traceback.print_exception(error)
        return what + "please report it with the traceback above"
    return what + f"please report it, and attach {file}, which has what is needed to find it and nothing private"


def bug_report(error: BaseException, preset: str) -> str:
    """Describe an error: traceback, command, versions, platform, preset; no environment and no secrets."""
    parts = {
        "kdctl": f"{__version__} on Python {sys.version.split()[0]}, {platform.platform()}, {os.cpu_count()} cores",
        "command": " ".join(sys.argv),
        "traceback": "".join(traceback.format_exception(error)),
        "versions": "\n".join(_versions()),
        "preset": preset or "none was resolved",
    }
    return without_secrets("\n\n".join(f"[{name}]\n{text}" for name, text in parts.items()) + "\n")


def without_secrets(text: str) -> str:
    """Replace what looks like a secret, the values of variables that hold some, and the home folder's name."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    home = os.path.expanduser("~")
    return SECRET_WORDS.sub("***", text.replace(home, "~") if len(home) > 1 else text)


def _versions() -> list[str]:
    """List the versions of everything that kdctl needs."""
    try:
        needed = requires("kdctl") or []
    except PackageNotFoundError:
        needed = []
    found = []
    for name in dict.fromkeys(re.split(r"[^\w.-]", line)[0] for line in needed if "extra ==" not in line):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    return found


def _write(text: str, folder: Path | None) -> Path | None:
    """Write the file to the first place that takes it."""
    name = time.strftime(f"kdctl-bug-%Y%m%d-%H%M%S-{os.getpid()}.txt", time.gmtime())
    places = [folder] if folder is not None and folder.is_dir() else []
    for place in [*places, Path(tempfile.gettempdir())]:
        try:
            (place / name).write_text(text, encoding="utf-8", errors="replace")
        except OSError:
            continue
        return place / name
    return None
