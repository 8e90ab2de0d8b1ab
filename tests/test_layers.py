"""The shape of the package, read from its syntax: layers, who may import what, and what is never done."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kdctl"
LAYERS = {
    "__init__": 0,
    "errors": 0,
    "findings": 0,
    "keyed": 0,
    "memory": 0,
    "preset": 0,
    "progress": 0,
    "records": 0,
    "resolve": 0,
    "rundir": 0,
    "card": 1,
    "products": 1,
    "processes": 1,
    "stats.averages": 1,
    "stats.bootstrap": 1,
    "stats.comparisons": 1,
    "stats.gaps": 1,
    "stats.groups": 1,
    "stats.proportions": 1,
    "stats.repeats": 1,
    "stats.verdicts": 1,
    "quant.affine": 1,
    "quant.blocks": 1,
    "quant.gptq": 1,
    "quant.methods": 1,
    "quant.rows": 1,
    "quant.shadow": 1,
    "sweep.journal": 1,
    "sweep.kubernetes": 1,
    "sweep.locks": 1,
    "sweep.plan": 1,
    "sweep.space": 1,
    "sweep.wandb_config": 1,
    "sweep.workers": 1,
    "distill.batch": 1,
    "distill.optimizer": 1,
    "distill.divergence": 1,
    "attention": 2,
    "gguf_layout": 2,
    "architecture": 2,
    "cost": 2,
    "footprint": 2,
    "foreign": 2,
    "inspection": 2,
    "models": 2,
    "prompts": 2,
    "metrics": 2,
    "packed": 2,
    "report.charts": 1,
    "report.tables": 1,
    "report.contrasts": 2,
    "report.columns": 2,
    "report.layouts": 2,
    "report.details": 2,
    "report.verdicts": 2,
    "report.reproduce": 2,
    "report.document": 2,
    "report.marks": 2,
    "report.curves": 2,
    "report.figures": 2,
    "report.drawing": 2,
    "report.gallery": 2,
    "report.page": 2,
    "samples": 2,
    "study": 2,
    "study_reader": 2,
    "sweep.board": 2,
    "tokens": 2,
    "tracking": 2,
    "quant.apply": 2,
    "quant.autoround": 2,
    "quant.calibrate": 2,
    "quant.checkpoint": 2,
    "quant.layout": 2,
    "rollout.generate": 2,
    "rollout.plan": 2,
    "rollout.states": 2,
    "rollout.store": 2,
    "distill.checkpoint": 2,
    "distill.feed": 2,
    "distill.recompute": 2,
    "distill.monitor": 2,
    "tasks.harness": 2,
    "tasks.items": 2,
    "tasks.likelihood": 2,
    "tasks.offline": 2,
    "distill.loop": 3,
    "evaluate": 3,
    "export": 3,
    "plan": 3,
    "report.front": 3,
    "verify": 3,
    "job": 4,
    "stages.gates": 4,
    "stages.rollouts": 4,
    "stages.quantizing": 4,
    "stages.distilling": 4,
    "stages.evaluating": 4,
    "pipeline": 4,
    "students": 4,
    "sweep.local": 4,
    "console": 5,
    "views": 5,
    "command": 5,
    "cli": 5,
    "plan_command": 5,
    "sweep_command": 5,
    "__main__": 5,
}
ALLOWED = {
    "rich": {"console"},
    "typer": {"cli", "command", "plan_command", "sweep_command"},
    "optuna": {"sweep.journal", "sweep.board"},
    "filelock": {"sweep.locks"},
    "yaml": {"sweep.space", "sweep.kubernetes", "students"},
    "wandb": {"tracking"},
    "datasets": {"prompts", "evaluate", "tasks.harness", "tasks.offline"},
    "lm_eval": {"evaluate", "tasks.harness", "tasks.items", "tasks.likelihood", "tasks.offline"},
    "accelerate": {"processes"},
    "auto_round": {"quant.autoround"},
    "matplotlib": {"report.drawing"},
}
HEAVY = {"torch", "transformers", "datasets", "wandb", "lm_eval", "accelerate", "auto_round", "matplotlib"}


def module_name(path: Path) -> str:
    """Name a file like Python does, below kdctl."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
FILES = [name for name in TREES if not name.endswith(".__init__")]


def imported(tree: ast.AST) -> set[str]:
    """List every module that a file imports anywhere, and the names taken out of packages."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(name: str) -> set[str]:
    """List the kdctl files that a file imports."""
    found = set()
    for target in imported(TREES[name]):
        parts = target.split(".")
        if parts[0] == "kdctl":
            candidates = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            found.add(next((each for each in candidates if each in LAYERS), "__init__"))
    return found


def test_every_file_has_a_layer() -> None:
    assert set(FILES) == set(LAYERS), "a new or removed file: put it in LAYERS, and in DESIGN.md"


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downward(name: str) -> None:
    for target in own_imports(name):
        assert LAYERS[target] <= LAYERS[name], f"{name} (L{LAYERS[name]}) imports {target} (L{LAYERS[target]})"


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer == 3])
def test_stages_do_not_import_each_other(name: str) -> None:
    assert [target for target in own_imports(name) if LAYERS[target] == 3] == []


def test_layers_are_seen_at_all() -> None:
    assert {"job", "quant.apply", "resolve"} <= own_imports("stages.quantizing")
    assert "__init__" in own_imports("cli")


@pytest.mark.parametrize("name", FILES)
def test_bundled_tasks_belong_to_evaluate(name: str) -> None:
    uses = any(target.startswith("tasks.") for target in own_imports(name))
    assert not uses or name == "evaluate" or name.startswith("tasks.")


@pytest.mark.parametrize("library", ALLOWED)
def test_a_library_is_imported_in_its_place_only(library: str) -> None:
    users = {name for name, tree in TREES.items() if library in {target.split(".")[0] for target in imported(tree)}}
    assert users <= ALLOWED[library]
    assert users, f"nothing imports {library} any more"


def loaded_after(modules: list[str]) -> set[str]:
    """Import modules in a fresh process and return the heavy libraries that came along."""
    names = ", ".join(f"kdctl.{name}" if name != "__init__" else "kdctl" for name in modules)
    code = f"import sys, {names}\nprint(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_outer_layers_import_nothing_heavy() -> None:
    outer = [name for name, layer in LAYERS.items() if layer in (0, 5) and name != "__main__"]
    assert loaded_after(outer) == set()
    assert own_imports("__main__") == {"cli"}


def test_a_report_needs_nothing_heavy() -> None:
    assert loaded_after(["report.front", "stats"]) == set()


@pytest.mark.parametrize("name", TREES)
def test_nothing_is_pickled(name: str) -> None:
    assert {target.split(".")[0] for target in imported(TREES[name])} & {"pickle", "dill", "shelve", "joblib"} == set()
    calls = {ast.unparse(node.func) for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)}
    assert calls & {"torch.save", "torch.load", "eval", "exec"} == set()


@pytest.mark.parametrize("name", TREES)
def test_what_the_design_never_wants_is_not_there(name: str) -> None:
    nodes = list(ast.walk(TREES[name]))
    assert not [node.lineno for node in nodes if isinstance(node, ast.ExceptHandler) and node.type is None], (
        "bare except"
    )
    assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)], "assert for user input"
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert called & {"hasattr", "getattr", "setattr"} == set()
    assert "random" not in imported(TREES[name])
    assert not any(
        "Trainer" in ast.unparse(base) for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases
    )


@pytest.mark.parametrize("name", TREES)
def test_importing_sets_no_environment_variable_and_no_logging(name: str) -> None:
    for statement in TREES[name].body:
        if isinstance(statement, ast.Expr | ast.Assign | ast.AugAssign | ast.If):
            text = ast.unparse(statement)
            assert "os.environ" not in text
            assert "logging." not in text


def public(body: list[ast.stmt]) -> list[ast.FunctionDef | ast.ClassDef]:
    """List the public functions and classes of a body, and the public methods of those classes."""
    found = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    return found + [inner for node in found if isinstance(node, ast.ClassDef) for inner in public(node.body)]


@pytest.mark.parametrize("name", TREES)
def test_everything_public_is_documented(name: str) -> None:
    assert ast.get_docstring(TREES[name]), "module"
    assert [node.name for node in public(TREES[name].body) if not ast.get_docstring(node)] == []
