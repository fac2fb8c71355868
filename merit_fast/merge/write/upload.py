"""An output in an object store. Its files are made in a local directory, one by one, and sent.

A store has no rename, so the output grows in place: the object ``.merit_fast_fingerprint`` names
the running merge, the index and stage.json come last, and an earlier output is removed first.
Processes that share a merge need no lock: each that sees all weights finishes it with the same
bytes.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.manifests.io import STAGE_FILE, StageManifest, read_manifest
from merit_fast.merge.engine.plan import Shard
from merit_fast.merge.read.checkpoint import INDEX_FILE
from merit_fast.merge.read.companions import CONFIG_FILE, TEMPLATE_FOLDER
from merit_fast.merge.read.remote import RemotePath, told

MARKER = ".merit_fast_fingerprint"  # fingerprint of the merge that may resume here
_LAST = (CONFIG_FILE, INDEX_FILE, STAGE_FILE)  # in this order: without them nothing looks finished
# s3fs would hold 10 parts of 50 MiB in memory.
_SENDING: dict[str, dict[str, int]] = {"s3": {"chunksize": 16 << 20, "max_concurrency": 4}}


class Upload:
    """One output in a store, as one of its writers sees it.

    Args:
        out: its prefix.
        wanted: weight file -> bytes, all of the output.
    """

    def __init__(self, out: RemotePath, wanted: Mapping[str, int]) -> None:
        self.out = out
        self.wanted = wanted

    def begin(self, fingerprint: str) -> bool:
        """Claims the prefix for the merge of this fingerprint and removes the files of another one.

        Several processes may call this at once, but over an earlier output one may remove a file
        that another has just sent; the merge is then unfinished, and the next call resumes it.

        Returns:
            Whether this very merge is finished there already.

        Raises:
            InputError: see ``check_output``.
        """
        present = check_output(self.out)
        made_by = (
            read_manifest(StageManifest, self.out / STAGE_FILE).fingerprint
            if STAGE_FILE in present
            else None
        )
        if made_by == fingerprint and self.all_written():
            return True
        claimed_by = (self.out / MARKER).read_text() if MARKER in present else None
        if claimed_by != fingerprint or made_by is not None:
            if present and claimed_by is None:
                self._put(MARKER, "")  # ours still if a crash comes before the new mark
            self._remove([name for name in (INDEX_FILE, STAGE_FILE) if name in present])
            self._remove([name for name in self._files() if name != MARKER])
            self._put(MARKER, fingerprint)
        return False

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file in the store."""
        return {name: int(entry["size"]) for name, entry in self.out.entries(fresh=True).items()}

    def all_written(self) -> bool:
        sizes = self.sizes()
        return all(sizes.get(name) == size for name, size in self.wanted.items())

    def spool_bytes(self, todo: Sequence[Shard]) -> int:
        """Bytes that the local disk must hold: one file being made and one being sent."""
        return sum(sorted(shard.num_bytes for shard in todo)[-2:])

    def send_weights(self, file: Path) -> None:
        """Sends a weight file's sidecars, then the file, and removes it here."""
        for sidecar in sorted(file.parent.glob(f"{file.name}.*")):
            if sidecar.suffix != ".part":
                self._send(sidecar, sidecar.name)
        self._send(file, file.name)
        file.unlink()

    def fetch_parts(self, directory: Path) -> bool:
        """Fetches the sidecars of all weight files, such as checksums, from the store.

        Returns:
            False if another process has finished the output meanwhile.
        """
        present = self.out.entries(fresh=True)
        if STAGE_FILE in present:
            return False
        for name in self._parts(present):
            if not (directory / name).exists():
                (self.out / name).copy_to(directory / name)
        return True

    def finish(self, directory: Path) -> None:
        """Sends all files of ``directory``, config.json, index and stage.json last."""
        names = [
            str(file.relative_to(directory))
            for file in sorted(directory.rglob("*"))
            if file.is_file()
        ]
        for name in sorted(names, key=lambda name: _LAST.index(name) if name in _LAST else -1):
            self._send(directory / name, name)

    def sweep(self) -> None:
        """Removes the marker and the sidecars, which a finished output does not need."""
        present = self.out.entries(fresh=True)
        self._remove([*self._parts(present), *([MARKER] if MARKER in present else [])])

    def _parts(self, present: Mapping[str, Any]) -> list[str]:
        return [
            name
            for name in present
            if name.rpartition(".safetensors.")[0] + ".safetensors" in self.wanted
        ]

    def _files(self) -> list[str]:
        """Names of files that an output of ours may have; only these are ever removed."""
        present = self.out.entries(fresh=True)
        names = [name for name, entry in present.items() if entry["type"] == "file"]
        if TEMPLATE_FOLDER in present:
            names += [
                f"{TEMPLATE_FOLDER}/{name}"
                for name in (self.out / TEMPLATE_FOLDER).entries(fresh=True)
            ]
        return names

    def _put(self, name: str, text: str) -> None:
        with told(self.out / name):
            self.out.store.pipe_file((self.out / name).path, text.encode())

    def _send(self, file: Path, name: str) -> None:
        target = self.out / name
        protocol = self.out.url.partition("://")[0]
        with told(target):
            self.out.store.put_file(str(file), target.path, **_SENDING.get(protocol, {}))

    def _remove(self, names: Sequence[str]) -> None:
        if names:
            with told(self.out):
                self.out.store.rm([(self.out / name).path for name in names])


def check_output(out: RemotePath) -> Mapping[str, Any]:
    """The names under an output's prefix.

    Raises:
        InputError: there are some, and no merge of ours made them; or see ``RemotePath.entries``.
    """
    present = out.entries(fresh=True)
    if present and STAGE_FILE not in present and MARKER not in present:
        raise InputError(
            f"{out}: holds objects and is not an output of merit-fast; remove them or choose "
            "another prefix"
        )
    return present


@contextmanager
def spool_directory(name: str) -> Iterator[Path]:
    """A temporary local directory for files that are being sent; TMPDIR chooses its disk."""
    with tempfile.TemporaryDirectory(prefix="merit-fast-") as parent:
        directory = Path(parent) / (name or "model")
        directory.mkdir()
        yield directory
