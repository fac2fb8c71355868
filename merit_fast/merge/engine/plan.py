"""The output's files as runs of elements, neighbouring tensors joined. Reads no data."""

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from merit_fast.kernels.average.deltas import DeltaRule
from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.kernels.average.elements import ElementRule
from merit_fast.kernels.average.vectors import VectorRule
from merit_fast.merge.engine.layout import OutputFile, OutputTensor
from merit_fast.merge.read.entries import TensorEntry, is_float, is_plain
from merit_fast.merge.rules.function import FunctionRule
from merit_fast.records import record

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
    offsets: dict[str, int] = {}
    end = len(file.header)
    for stored in file.stored:
        offsets[stored.name] = end
        end += stored.num_bytes
    segments: list[Segment] = []
    copies: list[Segment] = []
    run: _Run | None = None
    for tensor in file.tensors:
        if tensor.copied:
            copies += [_copy(name, offsets[name], part) for name, part in tensor.copied]
            continue
        if not tensor.num_elements:
            continue
        offset = offsets[tensor.name]
        if not is_float(tensor.inputs[0]):
            copies.append(_segment(tensor, offset))
            continue
        own = rule(named_entry(tensor))
        if run is None or not run.is_followed_by(tensor, offset, own):
            segments += [run.segment(offsets)] if run else []
            run = _Run(tensor, offset, own)
        run.add(tensor)
    segments += [run.segment(offsets)] if run else []
    return Shard(file.name, file.header, end, tuple(segments), tuple(copies))


def _copy(name: str, offset: int, part: TensorEntry) -> Segment:
    return Segment((name,), (part.num_elements,), part.dtype, offset, (part,))


def named_entry(tensor: OutputTensor) -> TensorEntry:
    """The tensor's entry in the first input, under the output's name."""
    entry = tensor.inputs[0]
    if type(entry) is TensorEntry and entry.name == tensor.name:
        return entry
    return TensorEntry(
        tensor.name, entry.dtype, entry.shape, entry.file, entry.offset, entry.num_bytes
    )


def _segment(tensor: OutputTensor, offset: int, rule: Rule = ()) -> Segment:
    return Segment(
        (tensor.name,), (tensor.num_elements,), tensor.dtype, offset, tensor.inputs, rule
    )


class _Run:
    """Neighbours that follow each other without a gap in the output and in every input."""

    def __init__(self, first: OutputTensor, offset: int, rule: Rule) -> None:
        self._first = first
        self._offset = offset
        self._rule = rule
        self._names: list[str] = []
        self._ends: list[int] = []
        self._elements = 0
        # Every rule but a sum is for one whole tensor, and so is every other form of an input.
        is_sum = isinstance(rule, tuple) and first.encoding is None
        self._is_open = is_sum and all(map(is_plain, first.inputs))

    def add(self, tensor: OutputTensor) -> None:
        self._elements += tensor.num_elements
        self._names.append(tensor.name)
        self._ends.append(self._elements)

    def is_followed_by(self, tensor: OutputTensor, offset: int, rule: Rule) -> bool:
        """Whether a tensor at this offset of the output, of this rule, can join the run."""
        first = self._first
        if not self._is_open or tensor.encoding or tensor.dtype != first.dtype:
            return False
        if rule is not self._rule and rule != self._rule:
            return False
        if self._offset + self._elements * ITEM_BYTES[first.dtype] != offset:
            return False
        if len(first.inputs) != len(tensor.inputs):
            return False
        return all(map(self._is_next, first.inputs, tensor.inputs))

    def _is_next(self, mine: TensorEntry, theirs: TensorEntry) -> bool:
        if mine.dtype != theirs.dtype or not is_plain(theirs):
            return False
        if mine.offset + self._elements * ITEM_BYTES[mine.dtype] != theirs.offset:
            return False
        return mine.file is theirs.file or mine.file == theirs.file

    def segment(self, offsets: Mapping[str, int]) -> Segment:
        """The run as one segment. ``offsets``: of all stored tensors in the output."""
        first = self._first
        scale_offset = offsets[first.encoding.scale_name] if first.encoding else 0
        return Segment(
            tuple(self._names),
            tuple(self._ends),
            first.dtype,
            self._offset,
            first.inputs,
            self._rule,
            first.encoding,
            scale_offset,
        )
