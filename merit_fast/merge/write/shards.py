"""Writes the output's shards, in this process or shared with others, and finishes the output."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.manifests.atomic import replace_file, write_text
from merit_fast.manifests.hashes import checksum
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.driver import write_shard
from merit_fast.merge.engine.geometry import write_geometry, write_shard_grams
from merit_fast.merge.engine.layout import index_text
from merit_fast.merge.engine.plan import Plan
from merit_fast.merge.engine.prepare import Inputs
from merit_fast.merge.engine.quantise.rounding import write_roundings
from merit_fast.merge.read.checkpoint import INDEX_FILE, read_header
from merit_fast.merge.read.companions import (
    copy_companions,
    find_head,
    output_dtypes,
    untie_if_different,
)
from merit_fast.merge.read.remote import Location
from merit_fast.merge.vocabulary.write import write_template, write_vocabulary
from merit_fast.merge.write.quantization import write_quantization
from merit_fast.merge.write.upload import Upload
from merit_fast.progress import Progress

Share = tuple[int, int]  # this process's number from 1, and of how many
CHECKSUM_KEY = "xxh3_128"
_LOCK = ".finish.lock"


def write_shards(
    plan: Plan,
    config: MergeConfig,
    directory: Path,
    progress: Progress,
    share: Share = (1, 1),
    upload: Upload | None = None,
) -> None:
    """Writes this process's shards of the output. A shard that an interrupted run finished is kept.

    While one file goes to the disk, or by ``upload`` to a store and off the disk, the next is made.

    Raises:
        InputError: too little disk; see ``write_shard``.
    """
    mine = [shard for i, shard in enumerate(plan.shards) if i % share[1] == share[0] - 1]
    present = (
        upload.sizes()
        if upload
        else {file.name: file.stat().st_size for file in directory.iterdir()}
    )
    todo = [shard for shard in mine if present.get(shard.file) != shard.num_bytes]
    _check_space(
        directory, upload.spool_bytes(todo) if upload else sum(shard.num_bytes for shard in todo)
    )
    with progress.task(
        f"merge {directory.stem}", sum(s.num_elements for s in mine), "parameters"
    ) as task:
        task.skip(sum(shard.num_elements for shard in mine if shard not in todo))
        with ThreadPoolExecutor(1) as background:
            pending: list[Future[None]] = []
            for shard in todo:
                if upload and len(pending) > 1:
                    pending[-2].result()  # the disk holds two files
                temporary = directory / f"{shard.file}.part"
                grams = write_shard(shard, config, temporary, lambda count: task.advance(count))
                if config.stats:
                    write_shard_grams(directory, shard, grams)
                pending.append(
                    background.submit(_settle, temporary, directory / shard.file, config, upload)
                )
            for settled in pending:
                settled.result()


def all_written(plan: Plan, directory: Path) -> bool:
    return all((directory / shard.file).exists() for shard in plan.shards)


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
        write_geometry(directory, plan.shards, branches)
    tensors = [tensor for file in plan.files for tensor in file.tensors]
    dtypes = output_dtypes((tensor.dtype, tensor.num_elements) for tensor in tensors)
    copy_companions(inputs.companions, directory, dtypes, dequantized=inputs.dequantized)
    write_quantization(inputs, directory)
    write_roundings(directory, plan.shards)
    if inputs.vocabulary:
        write_vocabulary(directory, inputs.companions, inputs.vocabulary)
    if inputs.chat_template is not None:
        write_template(directory, inputs.chat_template)
    written = {
        entry.name: entry
        for file in plan.files
        for entry in read_header((weights_at or directory) / file.name)
    }
    if pair := find_head(written):
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
        write_text(directory / INDEX_FILE, text)
    for shard in plan.shards:
        _sidecar(directory / shard.file).unlink(missing_ok=True)


@contextmanager
def only_finisher(directory: Path, out: Path) -> Iterator[bool]:
    """Locks ``directory`` while it becomes ``out``; yields False if another process did that."""
    lock = directory / _LOCK
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        yield False
        return
    mine = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        mine = lock.exists() and os.fstat(descriptor).st_ino == lock.stat().st_ino
        yield mine
    finally:
        if mine:  # it has moved with the directory
            lock.unlink(missing_ok=True)
            (out / _LOCK).unlink(missing_ok=True)
        os.close(descriptor)


def verify_checksums(directory: Path) -> dict[str, str]:
    """Compares every file of a model with the checksum its index has.

    Returns:
        file -> checksum.

    Raises:
        InputError: the index has none, a file is absent or differs.
    """
    index = directory / INDEX_FILE
    try:
        metadata = json.loads(index.read_text(encoding="utf-8"))["metadata"][CHECKSUM_KEY]
        sums = {str(name): str(value) for name, value in metadata.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{index}: metadata.{CHECKSUM_KEY}: is absent; merge with --checksum writes it"
        ) from None
    for name, wanted in sums.items():
        file = directory / Path(name).name
        if not file.is_file():
            raise InputError(f"{file}: is absent, the index has its checksum")
        actual = checksum(file)
        if actual != wanted:
            raise InputError(
                f"{file}: {CHECKSUM_KEY} must be {wanted} as in the index, got {actual}"
            )
    return sums


def _settle(temporary: Path, final: Path, config: MergeConfig, upload: Upload | None) -> None:
    if config.checksum:
        write_text(_sidecar(final), checksum(temporary))
    replace_file(temporary, final, config.fsync)
    if upload:
        upload.send_weights(final)


def _known_checksum(file: Path) -> str:
    """Checksum taken when the file was written, or taken now if a killed run removed it."""
    sidecar = _sidecar(file)
    return sidecar.read_text() if sidecar.exists() else checksum(file)


def _sidecar(file: Path) -> Path:
    return file.with_name(f"{file.name}.{CHECKSUM_KEY}")


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds a path, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _check_space(directory: Path, needed: int) -> None:
    parts = sum(file.stat().st_size for file in directory.glob("*.part"))
    free = free_bytes(directory) + parts
    if free < needed:
        raise InputError(f"{directory}: needs {needed} bytes, the disk has {free}")
