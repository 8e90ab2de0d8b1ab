"""The rollout store: Arrow shards and a manifest written last.

A shard is one block of prompts, written atomically. A store without its manifest is unfinished: shards that carry the
same identity are kept, and the block in flight is generated again from its start. Nothing in a store depends on the
clock, so a resumed store equals an undisturbed one byte for byte.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kdctl.base.errors import StoreError
from kdctl.rollout import shard as shards
from kdctl.rollout.mapped import MappedRollouts, Shards
from kdctl.run.files import remove, sweep_up
from kdctl.run.hashes import known_files, note_known
from kdctl.run.names import inside
from kdctl.run.record_files import damaged, read_plain, read_record, write_record
from kdctl.run.records import Rollout, ShardEntry, StoreManifest

PLACE = ("prompt_index", "sample_index")
Place = tuple[int, int]
"""What tells a row from the others of its store: its prompt's index and its sample's."""


class RolloutStore:
    """A folder of shards and its manifest."""

    def __init__(self, path: Path):
        self.path = path
        self.manifest_path = path / "manifest.json"

    def manifest(self) -> StoreManifest:
        """Read the manifest. Raises StoreError if the store is unfinished or damaged."""
        found = read_record(self.manifest_path, StoreManifest)
        for shard in found.shards:
            if not shards.NAME.fullmatch(shard.file):
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
        return self.path / f"shard-{index:05d}{shards.SUFFIX}"

    def write_shard(self, index: int, rollouts: Sequence[Rollout], identity: str) -> ShardEntry:
        """Write one block of rollouts atomically, some rows at a time, and return its manifest entry."""
        return shards.write(self.shard_path(index), shards.record_batches(rollouts), identity)

    def kept_shard(self, index: int, identity: str, places: Sequence[Place]) -> ShardEntry | None:
        """Return the entry of a whole shard with this identity and these rows left by an earlier run, if there is one.

        One that an older kdctl left is written anew.
        """
        path = self.shard_path(index)
        for left in (path, path.with_suffix(shards.OLDER)):
            if found := shards.read_whole(left, identity):
                table, entry = found
                if list(zip(*(table[name].to_pylist() for name in PLACE), strict=True)) == list(places):
                    return entry if left == path else self.write_shard(index, shards.rollouts_of(table), identity)
        return None

    def finish(self, manifest: StoreManifest) -> None:
        """Write the manifest and remove shards that it does not name, and what a killed run left half-written."""
        named = {shard.file for shard in manifest.shards}
        for path in self.path.glob("shard-*"):
            if shards.NAME.fullmatch(path.name) and path.name not in named:
                remove(path)
        sweep_up(self.path)
        note_known(self.path, sorted(named))
        self.describe(manifest)

    def describe(self, manifest: StoreManifest) -> None:
        """Write the manifest and leave all shards where they are."""
        write_record(self.manifest_path, manifest)

    def reopen(self) -> None:
        """Make a finished store unfinished, before it is written anew."""
        remove(self.manifest_path)

    def read(self) -> MappedRollouts:
        """Return all rollouts in order, decoded when they are asked for.

        A shard that was hashed before is not read for it as long as its size and time stamps stay. Raises StoreError if
        one is missing or is not the one that was written.
        """
        return self._checked(self.manifest().shards)

    def read_shard(self, shard: ShardEntry) -> MappedRollouts:
        """Return the rollouts of one shard like ``read``."""
        inside(self.path, shard.file)
        return self._checked([shard])

    def _checked(self, entries: Sequence[ShardEntry]) -> MappedRollouts:
        """Compare every shard's hash with its entry, before anything is made of its rows."""
        paths = [self.path / entry.file for entry in entries]
        try:
            hashes = known_files(self.path, [entry.file for entry in entries])
        except (FileNotFoundError, IsADirectoryError) as error:
            raise StoreError(f"{error.filename} is named in the manifest and missing; {self._way_out()}") from None
        for path, entry, found in zip(paths, entries, hashes, strict=True):
            if found != entry.sha256:
                raise self._changed(path)
        rows, sums = zip(*((entry.rows, entry.sha256) for entry in entries), strict=True) if entries else ((), ())
        found = Shards(paths, rows, sums, self._changed)
        return MappedRollouts(found, range(found.ends[-1] if entries else 0))

    def _changed(self, path: Path) -> StoreError:
        return StoreError(f"{path} is not the shard that was written; {self._way_out()}")

    def _way_out(self) -> str:
        return f"delete the folder {self.path}, and the same command writes the same rollouts again"
