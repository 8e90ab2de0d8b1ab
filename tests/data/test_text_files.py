"""Text that parsers stumble over is told before they see it."""

import gzip
import re
from pathlib import Path

import pytest

from kdctl.base.errors import DataError
from kdctl.data.text_files import DEEPEST, check_text_file

DEEP = b"[" * (DEEPEST + 1)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "is nested more than 200 deep in line 1"),
        ("a.jsonl", b"{}\n" + b"[\n" * 300, f"deep in line {DEEPEST + 2}"),
        ("a.jsonl", gzip.compress(b"{}\n", mtime=0), "is compressed by gzip; give it the ending .gz"),
        ("a.csv", b"PAR1....", ""),
        ("a.json", b"PAR1\xff", "is Parquet; give it the ending .parquet"),
        ("a.jsonl.gz", b"{}\n", "cannot be unpacked: Not a gzipped file"),
        ("a.jsonl.xz", gzip.compress(b"{}", mtime=0), "cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 999, mtime=0)[:-9], "cannot be unpacked: Compressed file ended"),
        ("a.jsonl.GZ", gzip.compress(b"{}\n\xff", mtime=0), "is not UTF-8 text in line 2"),
        ("a.csv", DEEP, ""),
        ("a.jsonl", b'{"prompt": "' + DEEP + b'"}', ""),
        ("a.jsonl", b'{"prompt": "\\"' + DEEP + b'"}', ""),
        ("a.jsonl", b"[[]]\n" * 300, ""),
    ],
)
def test_what_is_wrong_is_told_with_the_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (path := tmp_path / name).write_bytes(content)
    kind = "csv" if name.endswith(".csv") else "json"
    if not says:
        return check_text_file(path, kind)
    with pytest.raises(DataError, match=re.escape(says)):
        check_text_file(path, kind)
