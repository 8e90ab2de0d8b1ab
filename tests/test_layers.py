"""What importing a folder brings along; who may import whom is a contract of import-linter in pyproject.toml."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "kdctl"
HEAVY = {"torch", "transformers", "datasets", "wandb", "lm_eval", "accelerate", "auto_round", "matplotlib", "hqq"}


def modules(*folders: str) -> list[str]:
    """List every module of some folders."""
    paths = [path for folder in folders for path in sorted((PACKAGE / folder).glob("*.py"))]
    return [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in paths
    ]


def loaded_after(names: list[str]) -> set[str]:
    """Import modules in a fresh process and return the heavy libraries that came along; no variable is set."""
    code = f"import os\nbefore = dict(os.environ)\nimport sys, {', '.join(names)}\nassert os.environ == before\n"
    code += f"print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_presets_records_and_the_command_line_import_nothing_heavy() -> None:
    assert loaded_after(modules("base", "config", "run", "cli", "quant/methods")) == set()


def test_a_report_needs_nothing_heavy() -> None:
    assert loaded_after(["kdctl.report.front", *modules("stats")]) == set()


def test_heavy_libraries_are_seen_at_all() -> None:
    assert "torch" in loaded_after(["kdctl.system.memory"])


CHANGES = {"unlink", "rmtree", "mkdir", "touch", "rename", "symlink_to", "hardlink_to", "copyfile", "copytree", "rmdir"}
LIBRARIES = {"save_file", "save_torch_state_dict", "save_pretrained", "save_weights", "write_table", "savez", "tofile"}
IN_MEMORY = {("data/prompt_set.py", "write_table"), ("formats/gguf.py", "tofile")}
"""Where a library writes to memory, or to a file that its caller gave it."""


def disk_changes(tree: ast.AST, inside: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the calls that change the disk by another way than ``kdctl.run.files``, and where they are."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            own = isinstance(node.func, ast.Attribute) and name in CHANGES | {"write_text", "write_bytes"}
            opened = name == "open" and any(
                isinstance(each, ast.Constant) and re.fullmatch(r"[rwax+bt]*[wax+][rwax+bt]*", str(each.value))
                for each in [*node.args[1:], *(word.value for word in node.keywords if word.arg == "mode")]
            )
            if own or opened or (name in LIBRARIES and not inside):
                yield node.lineno, name
        text = " ".join(map(ast.unparse, node.items)) if isinstance(node, ast.With) else ""
        yield from disk_changes(node, inside or "writing(" in text or "atomic_path(" in text)


def test_the_disk_is_changed_in_one_place_only() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        # The boundary opens the null device, the file for a bug must not depend on what may be at fault, and what
        # confines programs has a root in memory and writes to /proc.
        if name not in ("run/files.py", "cli/boundary.py", "cli/bug.py", "system/confined.py"):
            calls = disk_changes(ast.parse(path.read_text(encoding="utf-8")))
            found += [f"{name}:{line} {call}" for line, call in calls if (name, call) not in IN_MEMORY]
    assert found == []


def test_a_change_of_the_disk_is_seen_at_all() -> None:
    code = "with writing(path):\n    save_file(x, path)\nsave_file(x, path)\nopen(path, 'wb')\nopen(path)\n"
    assert list(disk_changes(ast.parse(code))) == [(3, "save_file"), (4, "open")]
