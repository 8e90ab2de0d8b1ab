"""The file behind a sweep's journal: one JSON line for each change, with a checksum of it and of all lines before.

Optuna's own file has no checksums, keeps what a full disk cut off, and waits 30 s for the lock of a killed process.
"""

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.storages.journal import BaseJournalBackend

from kdctl.run.files import append, make_folder, read_bytes, truncate
from kdctl.run.record_files import damaged

SUM = re.compile(rb',"sum":"([0-9a-f]{8})"}$')


class JournalFile(BaseJournalBackend):
    """Appends to and reads one journal; any number of processes may hold it open at once."""

    def __init__(self, path: Path):
        self._path = path
        make_folder(path.parent)
        self._lock = FileLock(path.with_suffix(".lock"))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add changes, all or none. Raises OSError if the disk fails, StoreError if the file is damaged."""
        with self._lock:
            whole = self._data().rfind(b"\n") + 1
            if self._path.exists() and self._path.stat().st_size > whole:  # a kill left a line unfinished
                truncate(self._path, whole)
            total, lines = [0, *(found for _, found in self._lines())][-1], []
            for log in logs:
                body = json.dumps(log, separators=(",", ":")).encode()
                total = zlib.crc32(body, total)
                lines.append(body[:-1] + b',"sum":"%08x"}\n' % total)
            append(self._path, b"".join(lines))

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the changes from a number on. Raises StoreError if any line is not the one that was written."""
        for number, (body, _) in enumerate(self._lines()):
            if number >= log_number_from:
                try:
                    yield json.loads(body)
                except ValueError as error:
                    raise damaged(self._path, f"line {number + 1}: {error}") from None

    def _data(self) -> bytes:
        return read_bytes(self._path) if self._path.exists() else b""

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        """Yield each whole line without its checksum, and the sum up to it; lines of older kdctl have none."""
        data, total, summed = self._data(), 0, False
        for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines()):
            found = SUM.search(line)
            body = line[: found.start()] + b"}" if found else line
            total = zlib.crc32(body, total)
            if (summed and not found) or (found and int(found[1], 16) != total):
                raise damaged(self._path, f"line {number + 1} is not the one that was written")
            summed = summed or bool(found)
            yield body, total
