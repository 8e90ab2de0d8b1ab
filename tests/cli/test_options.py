"""What every command does before it begins."""

import pytest

from kdctl.base.errors import PresetError
from kdctl.cli.options import check_launch

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"RANK": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({"WORLD_SIZE": None}, "RANK=1 and WORLD_SIZE=1"),
        ({"WORLD_SIZE": "0"}, "RANK=1 and WORLD_SIZE=0"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE=2 and no MASTER_ADDR"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is ''"),
        ({"RANK": None}, "WORLD_SIZE=2 and no RANK"),
    ],
)
def test_what_no_launcher_sets_is_named(monkeypatch, changes: dict[str, str | None], says: str) -> None:
    for name, value in (LAUNCHED | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(PresetError, match=says):
        check_launch(divided=True)


def test_what_a_launcher_sets_and_nothing_at_all_are_taken(monkeypatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    check_launch(divided=True)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    check_launch(divided=True)
