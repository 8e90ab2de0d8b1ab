"""The page of networks: one row a reason, whatever each network puts into it."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ZOO = Path(__file__).parents[2] / "benchmarks" / "zoo.py"
pytestmark = pytest.mark.skipif(not ZOO.exists(), reason="needs benchmarks/")


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ZOO.parent))
    spec = importlib.util.spec_from_file_location("zoo", ZOO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(kind: str, reason: str, word: str = "refused") -> dict[str, object]:
    return {"kind": kind, "word": word, "reason": reason, "gguf": "", "gap": 0.0, "composite": False}


def test_networks_are_grouped_by_reason(zoo: ModuleType) -> None:
    works = {"kind": "seen", "word": "works", "reason": "", "gguf": "no", "gap": 2e-6, "composite": True}
    found = [
        refused("a", "model type 'a' is not causal"),
        refused("b", "model type 'b' has experts (model.layers.0.mlp): a router"),
        works,
        refused(
            "c",
            "model type 'c_text' has experts (model.layers.1.ff): a router (not built at this size: X)",
            "not built",
        ),
    ]
    assert zoo.grouped(found) == {"has experts: a router": ["`b`", "`c` (not built)"], "is not causal": ["`a`"]}
    page = zoo.page(found)
    assert "| `seen` (text part) | no | 2e-06 |" in page
    assert "| 2 | has experts: a router | `b`, `c` (not built) |" in page


def test_what_differs_between_networks_is_left_out(zoo: ModuleType) -> None:
    for gap in ("0.14", "1.5"):
        reason = f"log-probabilities differ by {gap} nats on average, 0.001 is what rounding explains"
        assert zoo.shortened(reason) == "log-probabilities differ by more than the 0.001 nats that rounding explains"
