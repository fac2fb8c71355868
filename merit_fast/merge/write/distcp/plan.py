"""The shards of a distributed checkpoint as runs of elements for the engine."""

from collections.abc import Mapping
from pathlib import Path

from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.engine.layout import OutputFile
from merit_fast.merge.engine.plan import Plan, Rule, Segment, Shard, plan_alone
from merit_fast.merge.read.dcp.boxes import box_of
from merit_fast.merge.read.entries import TensorEntry, is_float
from merit_fast.merge.write.distcp.layout import DistributedFile, DistributedLayout, PlacedChunk
from merit_fast.records import replace

WHOLE_FOLDER = "whole"  # of an unfinished output, for tensors whose rule needs all of their chunks
_COPY: Rule = (1.0,)


def distributed_plan(plan: Plan, layout: DistributedLayout, directory: Path) -> Plan:
    """The plan of the shards, from the plan of whole tensors.

    A weighted sum is made chunk by chunk. Other rules look at a whole tensor; where one is cut into
    several chunks, ``Plan.before`` first writes all tensors into a folder of ``directory``, from
    which the shards are then cut.
    """
    rules = {name: segment.rule for name, segment in plan_alone(plan).items()}
    counts: dict[str, int] = {}
    for file in layout.files:
        for chunk in file.chunks:
            counts[chunk.name] = counts.get(chunk.name, 0) + 1
    is_whole = any(
        counts.get(name, 0) > 1 and not isinstance(rule, tuple) for name, rule in rules.items()
    )
    inputs = {name: tensor.inputs for name, tensor in layout.tensors.items()}
    if is_whole:
        inputs = _written(plan.files, directory / WHOLE_FOLDER)
        rules = dict.fromkeys(rules, _COPY)
    shards = tuple(_shard(file, layout, inputs, rules) for file in layout.files)
    return Plan(plan.files, shards, before=plan if is_whole else None)


def _shard(
    file: DistributedFile,
    layout: DistributedLayout,
    inputs: Mapping[str, tuple[TensorEntry, ...]],
    rules: Mapping[str, Rule],
) -> Shard:
    segments = []
    copies = [_copy_of_other(file, layout, number) for number in range(len(file.others))]
    for chunk in file.chunks:
        if not chunk.num_bytes:
            continue
        entries = tuple(box_of(e, chunk.offsets, chunk.sizes) for e in inputs[chunk.name])
        segment = _segment(chunk, entries)
        if is_float(layout.tensors[chunk.name].inputs[0]):
            segments.append(replace(segment, rule=rules[chunk.name]))
        else:
            copies.append(segment)
    return Shard(file.name, b"", file.num_bytes, tuple(segments), tuple(copies), frame=file)


def _segment(chunk: PlacedChunk, entries: tuple[TensorEntry, ...]) -> Segment:
    elements = chunk.num_bytes // ITEM_BYTES[chunk.dtype]
    return Segment((chunk.name,), (elements,), chunk.dtype, chunk.start, entries)


def _copy_of_other(file: DistributedFile, layout: DistributedLayout, number: int) -> Segment:
    """A value that is no tensor, byte for byte as in the first input."""
    saved, at = file.others[number]
    assert layout.source is not None
    item = saved.item
    path = layout.source.folder / item.file
    entry = TensorEntry(saved.name, "U8", (item.length,), path, item.offset, item.length)
    return Segment((saved.name,), (item.length,), "U8", at, (entry,))


def _written(files: tuple[OutputFile, ...], folder: Path) -> dict[str, tuple[TensorEntry, ...]]:
    """The tensors of safetensors files that are still to be written."""
    entries: dict[str, tuple[TensorEntry, ...]] = {}
    for file in files:
        at = len(file.header)
        for tensor in file.tensors:
            path = folder / file.name
            entry = TensorEntry(tensor.name, tensor.dtype, tensor.shape, path, at, tensor.num_bytes)
            entries[tensor.name] = (entry,)
            at += tensor.num_bytes
    return entries
