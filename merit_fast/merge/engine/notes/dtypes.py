"""The dtypes of a model in words, such as "bf16" or "F8_E4M3 with scales, bf16"."""

from collections.abc import Collection, Iterable

from merit_fast.kernels.average.dtypes import SPELLINGS
from merit_fast.merge.engine.layout import OutputTensor
from merit_fast.merge.read.companions import output_dtypes
from merit_fast.merge.read.entries import TensorEntry, is_quantised, own_dtype, value_dtype


def words_of_output(tensors: Collection[OutputTensor]) -> str:
    """Dtypes of an output: kinds of codes, then float dtypes, most common first."""
    kinds = {tensor.dtype for tensor in tensors if tensor.is_quantised}
    return _words(kinds, ((tensor.dtype, tensor.num_elements) for tensor in tensors))


def words_of_entries(entries: Collection[TensorEntry]) -> str:
    """Dtypes of an input's float tensors, as ``words_of_output``."""
    kinds = {own_dtype(entry) for entry in entries if is_quantised(entry)}
    plain = (entry for entry in entries if not is_quantised(entry))
    return _words(kinds, ((value_dtype(entry), entry.num_elements) for entry in plain))


def _words(kinds: Iterable[str], tensors: Iterable[tuple[str, int]]) -> str:
    words = [f"{kind} with scales" for kind in sorted(kinds)]
    words += [SPELLINGS.get(name, name) for name in output_dtypes(tensors)]
    return ", ".join(words) or "no float"
