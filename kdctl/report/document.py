"""A study's whole report: verdicts, tables, settings and commands, for people and for programs."""

from collections.abc import Sequence
from dataclasses import dataclass

from kdctl.base.strict_json import write_json
from kdctl.base.version import __version__
from kdctl.report.charts import Chart
from kdctl.report.columns import BASELINES, Results
from kdctl.report.contrasts import Contrasts
from kdctl.report.details import detail_tables
from kdctl.report.effects import effects
from kdctl.report.figure_files import link
from kdctl.report.layouts import lay_out
from kdctl.report.reproduce import commands, provenance, settings
from kdctl.report.study import Model, Study
from kdctl.report.tables import Table, document, markdown
from kdctl.report.verdicts import sentences

LEADING = ("minutes", "verdicts", "changes", "layers")
"""Figures that show what a person wants to know first: what minutes bought, what it changed, where the loss sits."""


@dataclass(frozen=True)
class Report:
    """Everything that is said of a study."""

    study: Study
    results: Results
    verdicts: list[str]
    """One paragraph of Markdown each."""
    layouts: list[Table]
    details: list[Table]
    provenance: Table

    @property
    def tables(self) -> list[Table]:
        """All tables."""
        return [*self.layouts, *self.details, self.provenance]


def make_report(study: Study, margin: float) -> Report:
    """Compare everything that can be compared. Raises DataError on a margin outside (0, 1)."""
    results = Results(study, contrasts := Contrasts(margin))
    return Report(
        study=study,
        results=results,
        verdicts=sentences(results),
        layouts=lay_out("auto", study, contrasts),
        details=[*effects(results), *detail_tables(results)],
        provenance=provenance(study),
    )


def as_markdown(report: Report, charts: Sequence[Chart] = ()) -> str:
    """Write report.md, which a code host renders: verdicts, tables, figures, what was done, how to repeat it."""
    names = ", ".join(source.name for source in report.study.sources)
    parts = [f"# Report on {names}", "## Verdicts", *verdict_parts(report.verdicts)]
    first, others = leading(charts)
    parts += [*map(link, first), "## Results", _tables(report.layouts)]
    if others:
        parts += ["## Figures", *map(link, others)]
    if report.details:
        parts += ["## Behind the verdicts", _tables(report.details)]
    parts.append("## Settings")
    for source in report.study.sources:
        listed = settings(report.study, source)
        parts.append("\n".join([f"`{source.run.path}`:", "", *(f"- {line}" for line in listed)]))
    parts += [_tables([report.provenance]), "## To reproduce"]
    for source in report.study.sources:
        lines = commands(report.study, source)
        parts.append("\n".join([f"`{source.run.path}`:", "", "```console", *(f"$ {line}" for line in lines), "```"]))
    return "\n\n".join(parts) + "\n"


def leading(charts: Sequence[Chart]) -> tuple[list[Chart], list[Chart]]:
    """Split figures into those that belong to the verdicts and the others."""
    return [one for one in charts if one.name in LEADING], [one for one in charts if one.name not in LEADING]


def verdict_parts(verdicts: Sequence[str]) -> list[str]:
    """Return the paragraphs of the verdicts, or say that there are none."""
    return list(verdicts) or ["There is no student to compare with the teacher yet."]


def _tables(tables: Sequence[Table]) -> str:
    return markdown(tables).rstrip("\n")


def as_json(report: Report) -> str:
    """Write report.json: every number, record and table in full precision."""
    content = {
        "kdctl": __version__,
        "margin": report.results.contrasts.margin,
        "folders": {source.name: str(source.run.path) for source in report.study.sources},
        "verdicts": report.verdicts,
        "comparisons": _comparisons(report.results),
        "models": [_model(model) for model in report.study.models],
        "tables": [document(table) for table in report.tables],
    }
    return write_json(content) + "\n"


def _comparisons(results: Results) -> list[dict[str, object]]:
    """List every comparison with its whole record and its Holm-corrected p."""
    found = []
    for row in results.rows:
        for kind in BASELINES:
            for tasks in [results.tasks, *((task,) for task in results.tasks if len(results.tasks) > 1)]:
                judged = results.judged(row, kind, tasks)
                if judged:
                    names = {"model": row.name, "baseline": kind, "tasks": list(tasks)}
                    corrected = {"p_holm": judged.p_holm, "family": judged.family, "words_holm": judged.words}
                    found.append(names | judged.found.model_dump(mode="json") | corrected)
    return found


def _model(model: Model) -> dict[str, object]:
    records = {"result": model.result, "quantized": model.quantized, "distilled": model.distilled}
    known = {name: record.model_dump(mode="json") for name, record in records.items() if record is not None}
    named = {"name": model.name, "kind": model.kind, "folders": model.folders, "train_loss": model.train_loss}
    return named | {"settings": vars(model.settings)} | known
