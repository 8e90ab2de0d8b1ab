"""The rollout store: Parquet shards and a manifest written last.

A shard is one block of prompts, written atomically. A store without its manifest is unfinished: shards that carry the
same identity are kept, and the block in flight is generated again from its start. Nothing in a store depends on the
clock, so a resumed store equals an undisturbed one byte for byte.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdctl.base.errors import StoreError
from kdctl.run.paths import read_record, sha256, write_bytes, write_record
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


class RolloutStore:
    """A folder of shards and its manifest."""

    def __init__(self, path: Path):
        self.path = path
        self.manifest_path = path / "manifest.json"

    def manifest(self) -> StoreManifest:
        """Read the manifest. Raises StoreError if the store is unfinished or damaged."""
        return read_record(self.manifest_path, StoreManifest)

    def complete(self, identity: str) -> bool:
        """Tell whether the store is finished and was made with these settings and inputs."""
        return self.manifest_path.exists() and self.manifest().identity == identity

    def fingerprint(self) -> str:
        """Return the sha256 of the manifest, which holds those of the shards."""
        return sha256(self.manifest_path)

    def shard_path(self, index: int) -> Path:
        """Return the path of a shard."""
        return self.path / f"shard-{index:05d}.parquet"

    def write_shard(self, index: int, rollouts: Sequence[Rollout], identity: str) -> ShardEntry:
        """Write one block of rollouts atomically and return its manifest entry."""
        schema = SCHEMA.with_metadata({IDENTITY: identity.encode()})
        table = pa.Table.from_pylist([vars(rollout) for rollout in rollouts], schema=schema)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        write_bytes(self.shard_path(index), buffer.getvalue())
        return self.entry(index, table)

    def entry(self, index: int, table: pa.Table) -> ShardEntry:
        """Describe a shard that is on disk."""
        tokens = sum(len(ids) for ids in table["completion_ids"].to_pylist())
        path = self.shard_path(index)
        step = table["policy_step"][0].as_py()
        return ShardEntry(
            file=path.name, rows=len(table), completion_tokens=tokens, sha256=sha256(path), policy_step=step
        )

    def kept_shard(self, index: int, identity: str) -> ShardEntry | None:
        """Return the entry of a whole shard with this identity left by an earlier run, if there is one."""
        try:
            table = pq.read_table(self.shard_path(index), page_checksum_verification=True)
        except (OSError, pa.ArrowException):
            return None
        if not table.schema.equals(SCHEMA.with_metadata({IDENTITY: identity.encode()}), check_metadata=True):
            return None
        return self.entry(index, table)

    def finish(self, manifest: StoreManifest) -> None:
        """Write the manifest and remove shards that it does not name, and what a killed run left half-written."""
        named = {shard.file for shard in manifest.shards}
        for path in [*self.path.glob("shard-*.parquet"), *self.path.glob(".*.tmp")]:
            if path.name not in named:
                path.unlink()
        write_record(self.manifest_path, manifest)

    def reopen(self) -> None:
        """Make a finished store unfinished, before it is written anew."""
        self.manifest_path.unlink(missing_ok=True)

    def read(self) -> list[Rollout]:
        """Read all rollouts in order. Raises StoreError if a shard is missing or is not the one that was written."""
        return [rollout for shard in self.manifest().shards for rollout in self.read_shard(shard)]

    def read_shard(self, shard: ShardEntry) -> list[Rollout]:
        """Read one shard and check its hash."""
        path = self.path / shard.file
        if not path.exists():
            raise StoreError(f"{path} is named in the manifest and missing; {self._way_out()}")
        data = path.read_bytes()
        if sha256(path) != shard.sha256:
            raise StoreError(f"{path} is not the shard that was written; {self._way_out()}")
        return [Rollout(**row) for row in pq.read_table(io.BytesIO(data)).to_pylist()]

    def _way_out(self) -> str:
        return f"delete the folder {self.path}, and the same command writes the same rollouts again"
