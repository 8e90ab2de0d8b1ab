"""The rollout store: Parquet shards and a manifest written last.

A shard is one block of prompts, written atomically. A store without its manifest is unfinished: shards that carry the
same identity are kept, and the block in flight is generated again from its start. Nothing in a store depends on the
clock, so a resumed store equals an undisturbed one byte for byte.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdctl.base.errors import StoreError
from kdctl.rollout.mapped import MappedRollouts, Shards
from kdctl.run.files import remove, sha256, sweep_up, write_bytes
from kdctl.run.names import inside
from kdctl.run.record_files import damaged, read_plain, read_record, write_record
from kdctl.run.records import Rollout, ShardEntry, StoreManifest

# Parquet's own name for list items, so that the schema that is read equals the one that was written.
INTEGERS = pa.list_(pa.field("element", pa.int32()))
NUMBERS = pa.list_(pa.field("element", pa.float32()))
SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_index", pa.int32(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt_ids", INTEGERS, nullable=False),
        pa.field("completion_ids", INTEGERS, nullable=False),
        pa.field("logprobs", NUMBERS),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("policy_step", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)
IDENTITY = b"kdctl.identity"
PLACE = ("prompt_index", "sample_index")
Place = tuple[int, int]
"""What tells a row from the others of its store: its prompt's index and its sample's."""
SHARD = re.compile(r"shard-\d{5,}\.parquet")


def encoded(table: pa.Table) -> bytes:
    """Return a table as a Parquet file, the same bytes for the same rows."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


class RolloutStore:
    """A folder of shards and its manifest."""

    def __init__(self, path: Path):
        self.path = path
        self.manifest_path = path / "manifest.json"

    def manifest(self) -> StoreManifest:
        """Read the manifest. Raises StoreError if the store is unfinished or damaged."""
        found = read_record(self.manifest_path, StoreManifest)
        for shard in found.shards:
            if not SHARD.fullmatch(shard.file):
                raise damaged(self.manifest_path, f"it names {shard.file!r}, which is no shard of the folder")
        return found

    @property
    def finished(self) -> bool:
        """Tell whether the store is there, made in whatever way."""
        return self.manifest_path.exists()

    def complete(self, identity: str) -> bool:
        """Tell whether the store is finished and was made with these settings and inputs."""
        return self.manifest_path.exists() and self.manifest().identity == identity

    def fingerprint(self) -> str:
        """Return the sha256 of the manifest, which holds those of the shards."""
        return hashlib.sha256(read_plain(self.manifest_path).encode()).hexdigest()

    def shard_path(self, index: int) -> Path:
        """Return the path of a shard."""
        return self.path / f"shard-{index:05d}.parquet"

    def write_shard(self, index: int, rollouts: Sequence[Rollout], identity: str) -> ShardEntry:
        """Write one block of rollouts atomically and return its manifest entry."""
        return self.write_table(index, pa.Table.from_pylist([vars(r) for r in rollouts], schema=SCHEMA), identity)

    def write_table(self, index: int, table: pa.Table, identity: str) -> ShardEntry:
        """Write one block of rollouts that are a table of ``SCHEMA``, like ``write_shard``."""
        table = table.replace_schema_metadata({IDENTITY: identity.encode()})
        data = encoded(table)
        write_bytes(self.shard_path(index), data)
        return self._entry(index, table, data)

    def _entry(self, index: int, table: pa.Table, data: bytes) -> ShardEntry:
        """Describe a shard by its content and its bytes."""
        return ShardEntry(
            file=self.shard_path(index).name,
            rows=len(table),
            completion_tokens=pc.sum(pc.list_value_length(table["completion_ids"])).as_py(),  # pyright: ignore
            sha256=hashlib.sha256(data).hexdigest(),
            policy_step=table["policy_step"][0].as_py(),
        )

    def kept_shard(self, index: int, identity: str, places: Sequence[Place]) -> ShardEntry | None:
        """Return the entry of a whole shard with this identity and these rows left by an earlier run, if there is one.

        Damage that its rows do not show, in the description behind them, is mended.
        """
        try:
            found = self.shard_path(index).read_bytes()
            table = pq.read_table(pa.BufferReader(found), page_checksum_verification=True)
        except (OSError, pa.ArrowException):
            return None
        if not table.schema.equals(SCHEMA.with_metadata({IDENTITY: identity.encode()}), check_metadata=True):
            return None
        if list(zip(*(table[name].to_pylist() for name in PLACE), strict=True)) != list(places):
            return None
        data = encoded(table)
        if data != found:
            write_bytes(self.shard_path(index), data)
        return self._entry(index, table, data)

    def finish(self, manifest: StoreManifest) -> None:
        """Write the manifest and remove shards that it does not name, and what a killed run left half-written."""
        named = {shard.file for shard in manifest.shards}
        for path in self.path.glob("shard-*.parquet"):
            if path.name not in named:
                remove(path)
        sweep_up(self.path)
        self.describe(manifest)

    def describe(self, manifest: StoreManifest) -> None:
        """Write the manifest and leave all shards where they are."""
        write_record(self.manifest_path, manifest)

    def reopen(self) -> None:
        """Make a finished store unfinished, before it is written anew."""
        remove(self.manifest_path)

    def read(self) -> MappedRollouts:
        """Return all rollouts in order, decoded when they are asked for.

        Raises StoreError if a shard is missing or is not the one that was written.
        """
        return self._checked(self.manifest().shards)

    def read_shard(self, shard: ShardEntry) -> MappedRollouts:
        """Return the rollouts of one shard like ``read``."""
        return self._checked([shard])

    def _checked(self, shards: Sequence[ShardEntry]) -> MappedRollouts:
        """Compare every shard's hash with its entry, before anything is made of its rows."""
        paths = [inside(self.path, shard.file) for shard in shards]
        for path, shard in zip(paths, shards, strict=True):
            if not path.exists():
                raise StoreError(f"{path} is named in the manifest and missing; {self._way_out()}")
            if sha256(path) != shard.sha256:
                raise self._changed(path)
        found = Shards(paths, [shard.rows for shard in shards], self._changed)
        return MappedRollouts(found, range(found.ends[-1] if shards else 0))

    def _changed(self, path: Path) -> StoreError:
        return StoreError(f"{path} is not the shard that was written; {self._way_out()}")

    def _way_out(self) -> str:
        return f"delete the folder {self.path}, and the same command writes the same rollouts again"
