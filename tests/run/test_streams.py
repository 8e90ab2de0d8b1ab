"""A stream is the table that was written, lies in its file, and says whether it is whole."""

import pyarrow as pa
import pytest

from kdctl.run.files import sha256
from kdctl.run.streams import let_go, mapped_stream, whole_sha256, write_stream

SCHEMA = pa.schema([("a", pa.int32()), ("b", pa.string())], metadata={"said": "é"})


def batches():
    return (pa.record_batch({"a": range(n, n + 9), "b": [f"{n} " * n] * 9}, SCHEMA) for n in range(40))


def test_a_table_comes_back_and_lies_in_the_file(tmp_path):
    found = write_stream(tmp_path / "s.arrow", SCHEMA, batches())
    assert found == sha256(tmp_path / "s.arrow") == whole_sha256(tmp_path / "s.arrow")
    allocated = pa.total_allocated_bytes()
    table, mapped = mapped_stream(tmp_path / "s.arrow")
    assert pa.total_allocated_bytes() == allocated
    assert mapped.size == (tmp_path / "s.arrow").stat().st_size
    expected = pa.Table.from_batches(batches())
    for _ in range(2):
        assert table.equals(expected, check_metadata=True)
        let_go(mapped)


def test_a_stream_is_written_a_batch_at_a_time(tmp_path):
    seen = []

    def counted():
        for number, batch in enumerate(batches()):
            yield batch
            seen.append((number, next(tmp_path.glob(".s.arrow*")).stat().st_size))

    write_stream(tmp_path / "s.arrow", SCHEMA, counted())
    assert seen[-1][1] > seen[25][1] > 0


def test_whatever_byte_is_changed_a_file_is_not_whole(tmp_path):
    path = tmp_path / "s.arrow"
    write_stream(path, SCHEMA, batches())
    data = path.read_bytes()
    for place in range(0, len(data), 997):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert whole_sha256(path) == ""
    for other in (b"", data[:31], data[:-1], data + b"\0"):
        path.write_bytes(other)
        assert whole_sha256(path) == ""
    assert whole_sha256(tmp_path / "missing") == ""
    assert whole_sha256(tmp_path) == ""


def test_a_stream_that_fails_leaves_what_was_there(tmp_path):
    found = write_stream(tmp_path / "s.arrow", SCHEMA, batches())

    def failing():
        yield next(batches())
        raise KeyError("no more")

    with pytest.raises(KeyError):
        write_stream(tmp_path / "s.arrow", SCHEMA, failing())
    assert sha256(tmp_path / "s.arrow") == found
    assert [path.name for path in tmp_path.iterdir()] == ["s.arrow"]
