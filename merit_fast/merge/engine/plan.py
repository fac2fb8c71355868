"""The output's files as runs of elements, neighbouring tensors joined. Reads no data."""

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from merit_fast.kernels.average.deltas import DeltaRule
from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.kernels.average.elements import ElementRule
from merit_fast.kernels.average.vectors import VectorRule
from merit_fast.merge.engine.layout import OutputFile, OutputTensor, header_bytes
from merit_fast.merge.read.entries import TensorEntry, is_float, is_plain
from merit_fast.merge.rules.function import FunctionRule
from merit_fast.records import record, replace

if TYPE_CHECKING:
    from merit_fast.merge.engine.quantise.encoding import Encoding

Rule = tuple[float, ...] | DeltaRule | ElementRule | VectorRule | FunctionRule


@record(many=True)
class Segment:
    """A run of elements that is contiguous in every input and in the output. Offsets in bytes."""

    names: tuple[str, ...]
    ends: tuple[int, ...]  # where each tensor ends, in elements from the segment's start
    dtype: str  # of the output
    output_offset: int
    inputs: tuple[
        TensorEntry, ...
    ]  # of the first tensor, one per input; all tensors of an input have its dtype
    rule: Rule = ()  # coefficients of the first inputs, or a rule for deltas from the last input
    encoding: "Encoding | None" = (
        None  # the output holds codes; one tensor, its dtype that of codes
    )
    scale_offset: int = 0  # of the codes' scales

    @property
    def num_elements(self) -> int:
        return self.ends[-1]

    def name_at(self, element: int) -> str:
        """The tensor that holds an element of the segment."""
        return self.names[bisect.bisect_right(self.ends, element)]


class Frame(Protocol):
    """Bytes of a file that lie between its tensors' values."""

    def begin(self, descriptor: int) -> None:
        """Writes what is known before the values."""

    def finish(self, descriptor: int, threads: int) -> None:
        """Writes what follows from the values, such as checksums."""


@record
class Shard:
    """One output file: header, size, merged segments and tensors that are copied."""

    file: str
    header: bytes
    num_bytes: int
    segments: tuple[Segment, ...]
    copies: tuple[Segment, ...]  # equal in all inputs: integer tensors, quantised ones untouched
    frame: Frame | None = None

    @property
    def num_elements(self) -> int:
        return sum(segment.num_elements for segment in self.segments)


@record
class Plan:
    """The output's tensors and files. ``before``: a plan whose files these are made of."""

    files: tuple[OutputFile, ...]
    shards: tuple[Shard, ...]
    before: "Plan | None" = None

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def num_elements(self) -> int:
        return sum(shard.num_elements for shard in self.shards)


def plan_merge(
    files: Sequence[OutputFile], rule: Callable[[TensorEntry], Rule] = lambda entry: ()
) -> Plan:
    """Every output file's segments.

    Args:
        files: as ``lay_out`` gives them.
        rule: gives a float tensor's rule, from its entry in the first input under the output's
            name.
    """
    return Plan(tuple(files), tuple(_plan_shard(file, rule) for file in files))


def plan_alone(plan: Plan) -> dict[str, Segment]:
    """Every tensor of a plan that has elements as a segment of its own, at offset 0."""
    rules = {
        name: segment.rule
        for shard in plan.shards
        for segment in shard.segments
        for name in segment.names
    }
    tensors = [tensor for file in plan.files for tensor in file.tensors if tensor.num_elements]
    return {tensor.name: _segment(tensor, 0, rules.get(tensor.name, ())) for tensor in tensors}


def _plan_shard(file: OutputFile, rule: Callable[[TensorEntry], Rule]) -> Shard:
    header = header_bytes(file)
    offsets: dict[str, int] = {}
    end = len(header)
    for stored in file.stored:
        offsets[stored.name] = end
        end += stored.num_bytes
    segments: list[Segment] = []
    copies: list[Segment] = []
    for tensor in file.tensors:
        if tensor.copied:
            copies += [_copy(name, offsets[name], part) for name, part in tensor.copied]
        elif tensor.encoding and tensor.num_elements:
            segment = _segment(tensor, offsets[tensor.name], rule(named_entry(tensor)))
            scale_offset = offsets[tensor.encoding.scale_name]
            segments.append(replace(segment, encoding=tensor.encoding, scale_offset=scale_offset))
        elif tensor.num_elements and is_float(tensor.inputs[0]):
            segments.append(_segment(tensor, offsets[tensor.name], rule(named_entry(tensor))))
        elif tensor.num_elements:
            copies.append(_segment(tensor, offsets[tensor.name]))
    return Shard(file.name, header, end, tuple(_coalesce(segments)), tuple(copies))


def _copy(name: str, offset: int, part: TensorEntry) -> Segment:
    return Segment((name,), (part.num_elements,), part.dtype, offset, (part,))


def named_entry(tensor: OutputTensor) -> TensorEntry:
    """The tensor's entry in the first input, under the output's name."""
    entry = tensor.inputs[0]
    return TensorEntry(
        tensor.name, entry.dtype, entry.shape, entry.file, entry.offset, entry.num_bytes
    )


def _segment(tensor: OutputTensor, offset: int, rule: Rule = ()) -> Segment:
    return Segment(
        (tensor.name,), (tensor.num_elements,), tensor.dtype, offset, tensor.inputs, rule
    )


def _coalesce(segments: Sequence[Segment]) -> list[Segment]:
    """Joins neighbours that follow each other without a gap in the output and in every input."""
    runs: list[list[Segment]] = []
    elements = 0  # of the last run
    for segment in segments:
        if runs and _follows(runs[-1][0], elements, segment):
            runs[-1].append(segment)
        else:
            runs.append([segment])
            elements = 0
        elements += segment.num_elements
    return [_joined(run) for run in runs]


def _joined(run: Sequence[Segment]) -> Segment:
    names = tuple(name for segment in run for name in segment.names)
    ends = itertools.accumulate(segment.num_elements for segment in run)
    return replace(run[0], names=names, ends=tuple(ends))


def _follows(first: Segment, elements: int, segment: Segment) -> bool:
    """Whether a segment follows the run that ``first`` opens and that holds ``elements``."""
    is_sum = isinstance(first.rule, tuple)  # every other rule is for one whole tensor
    if first.encoding or segment.encoding or not is_sum:
        return False
    if first.rule != segment.rule or first.dtype != segment.dtype:
        return False
    if first.output_offset + elements * ITEM_BYTES[first.dtype] != segment.output_offset:
        return False
    if len(first.inputs) != len(segment.inputs):
        return False
    for mine, theirs in zip(first.inputs, segment.inputs, strict=True):
        same_run = mine.dtype == theirs.dtype and mine.file == theirs.file
        if not same_run or not is_plain(mine) or not is_plain(theirs):
            return False
        if mine.offset + elements * ITEM_BYTES[mine.dtype] != theirs.offset:
            return False
    return True
