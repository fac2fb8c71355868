"""Memory of the engine's buffers, and chunks that keep it within ``max_memory``."""

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.changes import most_factor_bytes
from merit_fast.merge.engine.compiled.native import kept_chunk_bytes
from merit_fast.merge.engine.compiled.sources import scratch_bytes, wide_bytes
from merit_fast.merge.engine.driver import GRAM_CHUNK
from merit_fast.merge.engine.prepare import Inputs
from merit_fast.merge.engine.quantise.needs import slab_bytes
from merit_fast.merge.read.entries import is_float, is_plain, value_dtype
from merit_fast.merge.rules.function import UserFunction
from merit_fast.merge.rules.kinds import ElementByElement, ThinnedDeltas
from merit_fast.merge.sizes import parse_bytes
from merit_fast.records import replace

_LEAST_CHUNK_KIB = 4


def buffer_bytes(inputs: Inputs, config: MergeConfig) -> int:
    """Memory of the engine's buffers: every worker holds a chunk of each input and the output."""
    all_tensors = [tensor for file in inputs.files for tensor in file.tensors]
    entries = [entry for tensor in all_tensors for entry in tensor.inputs]
    dtypes = {value_dtype(entry) for entry in entries if is_float(entry)}
    widest = max((ITEM_BYTES[dtype] for dtype in dtypes), default=1)
    if isinstance(config.method_entry.rule, UserFunction):  # it sees whole tensors in float64
        largest = max((tensor.num_elements for tensor in all_tensors), default=0)
        return (2 * len(inputs.checkpoints) + 4) * 8 * largest
    elements = max(config.chunk_kib * 1024 // widest, 1)
    method = config.method_entry
    by_squares = isinstance(method.rule, ThinnedDeltas) and method.rule.by_squares
    by_squares = by_squares or (isinstance(method.rule, ThinnedDeltas) and bool(config.rescale))
    by_row = isinstance(method.rule, (ThinnedDeltas, ElementByElement)) and method.rule.by_row
    by_row = by_row or config.vectors == "row"
    is_fused = by_row and isinstance(method.rule, ElementByElement)  # four rows in float64
    if config.stats or config.takes_gram or by_squares:
        elements = max(
            elements, GRAM_CHUNK
        )  # sums have one chunk size, so that they have one result
    if by_row:
        row = max((entry.shape[-1] for entry in entries if entry.shape), default=1)
        elements = max(elements, row)
    each = (len(inputs.checkpoints) + 1) * widest
    made = [tensor.inputs for tensor in all_tensors if not all(map(is_plain, tensor.inputs))]
    scratch = max((scratch_bytes(entry) for each in made for entry in each), default=0)
    kept = kept_chunk_bytes(config) if isinstance(method.rule, ThinnedDeltas) else 0
    sizes = 0 if method.is_sum else 8  # sizes, and the ones around a threshold
    ranks = 4 * (len(inputs.checkpoints) - 1) + 16 + 32 * is_fused if by_row else 0
    wide = max((sum(map(wide_bytes, each)) for each in made), default=0)
    shared = (2 + config.threads) * elements * wide  # two runs, and those that a worker still reads
    buffers = config.threads * elements * (each + scratch + sizes + ranks)
    encoder = config.threads * slab_bytes(t.encoding for t in all_tensors if t.encoding)
    factors = most_factor_bytes(made)
    return max(buffers + shared + factors + kept, encoder)


def fit_memory(inputs: Inputs, config: MergeConfig) -> int:
    """``chunk_kib`` so that the buffers keep within ``max_memory``.

    Raises:
        InputError: not even chunks of 4 KiB do, or the method's own least chunks do not.
    """
    if config.max_memory is None:
        return config.chunk_kib
    allowed = parse_bytes("max_memory", config.max_memory)
    chunk_kib = config.chunk_kib
    while (
        chunk_kib > _LEAST_CHUNK_KIB
        and buffer_bytes(inputs, replace(config, chunk_kib=chunk_kib)) > allowed
    ):
        chunk_kib = max(chunk_kib // 2, _LEAST_CHUNK_KIB)
    least = buffer_bytes(inputs, replace(config, chunk_kib=chunk_kib))
    if least > allowed:
        raise InputError(
            f"merge.max_memory: must be at least {least} bytes for method {config.method}, "
            f"{config.threads} threads "
            f"and {len(inputs.checkpoints)} inputs, got {allowed}"
        )
    return chunk_kib
