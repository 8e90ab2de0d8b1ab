"""An open run folder: the day that chat templates are given stays the one on which the folder was made."""

import datetime
import os
from pathlib import Path

import pytest

from kdctl.config.preset import Preset
from kdctl.run.record_files import read_record, write_record
from kdctl.stages import context
from kdctl.stages.context import open_run


class Later(datetime.date):
    """A clock that is years ahead."""

    @classmethod
    def today(cls) -> "Later":
        return cls(2099, 1, 2)


def test_a_run_keeps_the_day_on_which_it_was_made(
    smoke: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = open_run(smoke, tmp_path / "run").context
    assert made.preset.prompts.date == datetime.date.today().isoformat()
    assert read_record(made.paths.preset, Preset) == made.preset
    monkeypatch.setattr(context, "date", Later)
    assert open_run(smoke, tmp_path / "run").context.preset == made.preset
    assert open_run(smoke, tmp_path / "other").context.preset.prompts.date == "2099-01-02"
    chosen = smoke.model_copy(update={"prompts": smoke.prompts.model_copy(update={"date": "2001-02-03"})})
    assert open_run(chosen, tmp_path / "run").context.preset == chosen


def test_a_folder_that_names_no_day_was_made_when_its_preset_was_written(smoke: Preset, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_record(folder / "preset.json", smoke)
    noon = datetime.datetime(2025, 3, 4, 12).timestamp()
    os.utime(folder / "preset.json", (noon, noon))
    assert open_run(smoke, folder).context.preset.prompts.date == "2025-03-04"
