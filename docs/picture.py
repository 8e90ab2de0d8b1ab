"""Draw the picture of the front page from a run folder: ``python docs/picture.py runs/quickstart``.

The folder must hold a whole ``kdctl run quickstart`` and what ``kdctl quantize --compare minmax,gptq`` measured.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "figures" / "quickstart.svg"
STYLE = {"svg.hashsalt": "kdctl", "svg.fonttype": "path", "font.size": 9}
COMPARED = ("minmax", "gptq")
COLORS = ("#8c8c8c", "#c9a86a", "#d98c5f", "#b34700", "#0072b2")
NAMES = ("teacher, bf16", "INT4, rounded", "INT4, GPTQ", "INT4, kdctl", "INT4, kdctl, distilled")
Z = 1.96


def main(folder: Path) -> None:
    """Draw the KL to the teacher and the average accuracy, with 95 % intervals."""
    rows = list(csv.DictReader((folder / "report" / "tables" / "main.csv").read_text(encoding="utf-8").splitlines()))
    measured = [json.loads((folder / "compare" / f"{one}.json").read_text(encoding="utf-8")) for one in COMPARED]
    compared = [tuple(one["distribution"]["forward_kl"][end] for end in ("value", "low", "high")) for one in measured]
    kinds = [tuple(float(row[f"forward_kl{end}"]) for end in ("", "_low", "_high")) for row in rows[1:3]]
    teacher, *students = [_percent(float(row["average"]), float(row["average_stderr"])) for row in rows[:3]]
    with matplotlib.rc_context(STYLE):
        figure = Figure((7.6, 2.2), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, sharey=True)
        _bars(left, [None, *compared, *kinds], "KL to the teacher, nats a token", "{:.3f}", "0 by definition")
        _bars(right, [teacher, None, None, *students], "average accuracy of 5 tasks, %", "{:.1f}", "not measured")
        left.set_yticks(range(len(NAMES)), NAMES)
        left.invert_yaxis()
        figure.savefig(PICTURE, format="svg", metadata={"Date": None, "Creator": None})


def _percent(value: float, error: float) -> tuple[float, float, float]:
    return 100 * value, 100 * (value - Z * error), 100 * (value + Z * error)


def _bars(axis: Axes, values: list, label: str, form: str, missing: str) -> None:
    """Draw a bar and an interval for each value, and its number beyond the interval; a note where there is none."""
    most = max(high for _, _, high in filter(None, values))
    for line, one in enumerate(values):
        if one is None:
            axis.text(0.01 * most, line, missing, va="center", color="0.4", size=8)
            continue
        value, low, high = one
        axis.barh(line, value, color=COLORS[line], height=0.62)
        axis.errorbar(value, line, xerr=[[value - low], [high - value]], color="black", capsize=3, linewidth=1.2)
        axis.text(high + 0.03 * most, line, form.format(value), va="center")
    axis.set_xlim(0, 1.2 * most)
    axis.set_xlabel(label)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
