"""Writes the output's shards, in this process or shared with others, and finishes the output."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.errors import InputError
from merit_fast.manifests.atomic import replace_file, write_text
from merit_fast.manifests.hashes import checksum
from merit_fast.manifests.kept import is_proved, read_record, write_record
from merit_fast.manifests.locks import LockedError, exclusive, host_name, this_process
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.driver import write_shard
from merit_fast.merge.engine.layout import index_text
from merit_fast.merge.engine.plan import Plan, Shard
from merit_fast.merge.engine.prepare import Inputs
from merit_fast.merge.engine.quantise.needs import scratch_file_bytes
from merit_fast.merge.engine.quantise.rounding import write_roundings
from merit_fast.merge.read.checkpoint import INDEX_FILE
from merit_fast.merge.read.companions import (
    copy_companions,
    find_head,
    head_pair,
    output_dtypes,
    untie_if_different,
)
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.headers import read_header
from merit_fast.merge.read.remote import Location, RemotePath
from merit_fast.merge.write.answers import copy_adapter_answers
from merit_fast.merge.write.quantization import write_quantization

if TYPE_CHECKING:
    from merit_fast.merge.write.upload import Upload
from merit_fast.merge.write.verified import CHECKSUM_KEY
from merit_fast.progress import Progress, Task
from merit_fast.records import field, record
from merit_fast.threads import Job, map_in_threads

Share = tuple[int, int]  # this process's number from 1, and of how many
_THREADS = 4


@record(eq=False)
class ShardWriter:
    """Writes shards of one output into ``directory``.

    Attributes:
        locks: folder of the locks that processes of one merge share, one for each file. None: no
            other process writes here.
        upload: store to which finished files go.
        written: names of the files that this process has written.
    """

    config: MergeConfig
    directory: Path
    progress: Progress
    locks: Path | None = None
    upload: "Upload | None" = None
    written: set[str] = field(default_factory=set)

    def write(self, shards: Sequence[Shard]) -> None:
        """Writes the shards that are absent; those that another process writes come last.

        While one file goes to the disk, or to a store and off the disk, the next is made.

        Raises:
            InputError: too little disk; see ``write_shard``.
        """
        todo = self._absent(shards)
        self._check_space(todo)
        with self.progress.task(
            f"merge {self.directory.stem}", sum(s.num_elements for s in shards), "parameters"
        ) as task:
            task.skip(sum(shard.num_elements for shard in shards if shard not in todo))
            pending: list[Job] = []
            try:
                postponed = [shard for shard in todo if not self._write(shard, task, pending)]
                for shard in postponed:
                    self._write(shard, task, pending, wait=True)
            finally:
                for job in pending:
                    job.join()
            for job in pending:
                job.result()

    def prove(self, shards: Sequence[Shard]) -> None:
        """Hashes every file that this process has not written; makes damaged ones again."""
        kept = [shard for shard in shards if shard.file not in self.written]
        proofs = map_in_threads(self._is_proved, kept, _THREADS)
        damaged = [shard for shard, proof in zip(kept, proofs, strict=True) if not proof]
        for shard in damaged:
            file = self.directory / shard.file
            self.progress.note(f"{file}: is not as it was written; merging it again")
            file.unlink(missing_ok=True)
        if damaged:
            self.write(damaged)

    def _absent(self, shards: Sequence[Shard]) -> list[Shard]:
        if self.upload:
            present = self.upload.sizes()
            return [shard for shard in shards if present.get(shard.file) != shard.num_bytes]
        return [shard for shard in shards if not self._is_there(shard)]

    def _is_there(self, shard: Shard) -> bool:
        """Whether the file is written, or the whole output has its final name already."""
        try:
            return (self.directory / shard.file).stat().st_size == shard.num_bytes
        except FileNotFoundError:
            return not self.directory.exists()

    def _write(self, shard: Shard, task: Task, pending: list[Job], wait: bool = False) -> bool:
        """Writes one shard; False where another process is at it and ``wait`` is not set."""
        with ExitStack() as stack:
            if not self._lock(shard, stack, wait):
                return False
            if self.locks is not None and self._is_there(shard):
                task.skip(shard.num_elements)
                return True
            if self.upload and len(pending) > 1:
                pending[-2].result()  # the disk holds two files
            part = self._new_part(shard)
            written = write_shard(shard, self.config, part, task.advance, hashed=self._is_hashed)
            if self.config.stats:
                from merit_fast.merge.engine.geometry import write_shard_grams

                write_shard_grams(self.directory, shard, written.grams)
            held = stack.pop_all()  # until the file has its name
            earlier = pending[-1] if pending else None
            pending.append(Job(lambda: self._settle(part, shard, written.digest, held), earlier))
        return True

    def _lock(self, shard: Shard, stack: ExitStack, wait: bool) -> bool:
        if self.locks is None:
            return True
        lock = self.locks / f"file-{shard.file}"
        owner = this_process("")
        try:
            stack.enter_context(exclusive(lock, owner, wait=False))
        except LockedError as other:
            if not wait:
                return False
            self.progress.note(f"{shard.file}: {other} writes it; waiting for it")
            stack.enter_context(exclusive(lock, owner))
        return True

    @property
    def _is_hashed(self) -> bool:
        return self.upload is None or self.config.checksum

    def _new_part(self, shard: Shard) -> Path:
        """The name under which this process writes a file; removes what dead ones have left."""
        for old in self.directory.glob(f"{shard.file}*.part"):
            old.unlink()
        return self.directory / f"{shard.file}.{host_name()}-{os.getpid()}.part"

    def _settle(self, part: Path, shard: Shard, digest: str | None, held: ExitStack) -> None:
        final = self.directory / shard.file
        with held:
            if self._is_hashed:
                write_record(final, part, digest)
                if self.config.stats:
                    from merit_fast.merge.engine.geometry import gram_file

                    grams = gram_file(self.directory, shard)
                    write_record(grams, grams)
            replace_file(part, final, self.config.fsync)
            self.written.add(shard.file)
            if self.upload:
                self.upload.send_weights(final)

    def _is_proved(self, shard: Shard) -> bool:
        if not is_proved(self.directory / shard.file):
            return False
        if not self.config.stats:
            return True
        from merit_fast.merge.engine.geometry import GEOMETRY_FILE, gram_file

        if is_proved(self.directory / GEOMETRY_FILE):
            return True
        return is_proved(gram_file(self.directory, shard))

    def _check_space(self, todo: Sequence[Shard]) -> None:
        needed = sum(shard.num_bytes for shard in todo)
        if self.upload:
            needed = self.upload.spool_bytes(todo)
        needed += max((scratch_file_bytes(shard.segments) for shard in todo), default=0)
        parts = sum(
            file.stat().st_size
            for shard in todo
            for file in self.directory.glob(f"{shard.file}*.part")
        )
        free = free_bytes(self.directory) + parts
        if free < needed:
            raise InputError(f"{self.directory}: needs {needed} bytes, the disk has {free}")


def share_of(plan: Plan, share: Share) -> list[Shard]:
    """Every n-th shard from the i-th on, of a share (i, n)."""
    number, count = share
    return [shard for i, shard in enumerate(plan.shards) if i % count == number - 1]


def all_written(plan: Plan, directory: Path) -> bool:
    """Whether every shard has its final name, or the whole output has."""
    return not directory.exists() or all((directory / shard.file).exists() for shard in plan.shards)


def _write_tokenizer(inputs: Inputs, models: Sequence[Location], directory: Path) -> None:
    """Writes the tokenizer's files and the chat template, where they are not the companions'."""
    if inputs.vocabulary is None and inputs.chat_template is None:
        copy_adapter_answers(models, directory)
        return
    from merit_fast.merge.vocabulary.write import write_template, write_vocabulary

    if inputs.vocabulary:
        write_vocabulary(directory, inputs.companions, inputs.vocabulary)
    if inputs.chat_template is not None:
        write_template(directory, inputs.chat_template)


def finish_output(
    plan: Plan,
    inputs: Inputs,
    branches: Sequence[Location],
    config: MergeConfig,
    directory: Path,
    weights_at: Location | None = None,
) -> None:
    """Adds every file that holds no weights; the index last.

    Args:
        branches: the models whose deltas ``config.stats`` has measured.
        weights_at: location of the weights. None: ``directory``.
    """
    if config.stats:
        from merit_fast.merge.engine.geometry import write_geometry

        write_geometry(directory, plan.shards, branches)
    tensors = [tensor for file in plan.files for tensor in file.tensors]
    dtypes = output_dtypes((tensor.dtype, tensor.num_elements) for tensor in tensors)
    copy_companions(inputs.companions, directory, dtypes, dequantized=inputs.dequantized)
    write_quantization(inputs, directory)
    write_roundings(directory, plan.shards)
    _write_tokenizer(inputs, branches, directory)
    if pair := _written_head(plan, weights_at or directory):
        untie_if_different(directory, *pair)
    metadata: dict[str, object] = {}
    if config.checksum:
        metadata = {
            CHECKSUM_KEY: {
                shard.file: _known_checksum(directory / shard.file) for shard in plan.shards
            }
        }
    text = index_text(plan.files, metadata)
    if text is not None:
        write_text(directory / INDEX_FILE, text, fsync=False)  # with the whole output


def _written_head(plan: Plan, folder: Location) -> tuple[TensorEntry, TensorEntry] | None:
    """(input embedding, output head) in the files just written, if the output has one of each."""
    files = {stored.name: file.name for file in plan.files for stored in file.stored}
    names = head_pair(files)
    if names is None:
        return None
    written = {
        entry.name: entry
        for file in {files[name] for name in names}
        for entry in read_header(folder / file)
    }
    return find_head(written)


def _known_checksum(file: Path) -> str:
    """The hash taken when the file was written, or taken now if a killed run removed it."""
    record = read_record(file)
    return checksum(file) if record is None else record[2]


def free_bytes(path: Location) -> int:
    """Free bytes of the disk that holds a path, which need not exist yet.

    Of a place in a store: of the disk that gets temporary files.
    """
    if isinstance(path, RemotePath):
        import tempfile

        path = Path(tempfile.gettempdir())
    while not path.exists() and path != path.parent:
        path = path.parent
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize
