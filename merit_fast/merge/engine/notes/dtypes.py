"""The dtypes of a model in words, such as "bf16" or "F8_E4M3 with scales, bf16"."""

from collections.abc import Collection, Iterable, Sequence

from merit_fast.kernels.average.dtypes import SPELLINGS
from merit_fast.merge.engine.layout import OutputTensor
from merit_fast.merge.read.adapters.folder import is_adapter
from merit_fast.merge.read.companions import output_dtypes
from merit_fast.merge.read.entries import TensorEntry, is_quantised, own_dtype, value_dtype
from merit_fast.merge.read.remote import Location


def words_of_output(tensors: Collection[OutputTensor]) -> str:
    """Dtypes of an output: kinds of codes, then float dtypes, most common first."""
    kinds = {tensor.dtype for tensor in tensors if tensor.is_quantised}
    return _words(kinds, ((tensor.dtype, tensor.num_elements) for tensor in tensors))


def words_of_entries(entries: Collection[TensorEntry]) -> str:
    """Dtypes of an input's float tensors, as ``words_of_output``."""
    kinds = {own_dtype(entry) for entry in entries if is_quantised(entry)}
    plain = (entry for entry in entries if not is_quantised(entry))
    return _words(kinds, ((value_dtype(entry), entry.num_elements) for entry in plain))


def dtype_reason(
    asked: str | None,
    dtypes: str,
    base_dtypes: str,
    models: Sequence[Location],
    base: Location | None,
) -> str:
    """Why the output has its dtype, in one clause.

    Args:
        asked: ``config.dtype``.
        dtypes: of the output in words.
        base_dtypes: of the base in words; "" without a base.
        models: paths of the models.
        base: path of the base.
    """
    if asked:
        return "as asked for"
    is_lent = bool(base) and all(is_adapter(path) for path in models)
    reason = "the base's own: all models are adapters" if is_lent else "the models' own"
    if base_dtypes and base_dtypes != dtypes:
        reason += f"; the base is {base_dtypes} and is read as it is"
    return reason


def _words(kinds: Iterable[str], tensors: Iterable[tuple[str, int]]) -> str:
    words = [f"{kind} with scales" for kind in sorted(kinds)]
    words += [SPELLINGS.get(name, name) for name in output_dtypes(tensors)]
    return ", ".join(words) or "no float"
