"""Options are made of preset fields and of dataclasses."""

from dataclasses import dataclass
from typing import Annotated, get_args

import pytest
import typer
from typer.testing import CliRunner

from kdctl.cli.fields import Flags, field, options
from kdctl.config.preset import DistillSection


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("distill.lr", float | None),
        ("quantize.bits", int | None),
        ("quantize.symmetric", bool | None),
        ("distill.train", str | None),
        ("eval.limit", int | None),
        ("distill.lora_alpha", float | None),
        ("eval.tasks", list[str] | None),
    ],
)
def test_an_option_reads_the_type_of_its_field(key: str, kind: object) -> None:
    assert get_args(field(key).annotation)[0] == kind


def test_an_option_is_described_by_the_words_under_its_field() -> None:
    option = get_args(field("distill.train", "--learns").annotation)[1]
    assert option.help == f"{DistillSection.model_fields['train'].description} (weights, lora, scales)"
    assert option.default == "--learns"


@dataclass(frozen=True)
class Shared:
    loud: Annotated[bool, typer.Option("--loud")] = False


def test_a_command_gets_its_options_in_place() -> None:
    app, seen = typer.Typer(), []

    @app.command()
    @options("distill.lr", "distill.lmbda --lambda")
    def work(
        flags: Flags, name: Annotated[str, typer.Argument()], count: Annotated[int, typer.Option()] = 1, *, rest: Shared
    ) -> None:
        """Do it."""
        seen.append((flags, name, count, rest))

    done = CliRunner().invoke(app, ["here", "--lambda", "0.5", "--loud", "--count", "3"])
    assert done.exit_code == 0, done.output
    assert seen == [({"distill.lr": None, "distill.lmbda": 0.5}, "here", 3, Shared(loud=True))]
    params = typer.main.get_command(app).params
    assert [param.opts[0] for param in params][:5] == ["--lr", "--lambda", "name", "--count", "--loud"]
