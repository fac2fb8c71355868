"""Which output tensors are quantised, and how."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge.config import FP8_BLOCK
from merit_fast.merge.engine.quantise.encoding import (
    BLOCK,
    Encoding,
    block_encoding,
    same_encoding,
)
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.entries import (
    ChangedEntry,
    DecodedEntry,
    TensorEntry,
    is_float,
    is_quantised,
    quantised_source,
)
from merit_fast.merge.read.quantised.codes import stem_of
from merit_fast.records import record

Untouched = Callable[[str, Sequence[TensorEntry]], bool]
# Weights that are nn.Linear in every model of transformers that has them. Others stay as they are.
_LINEARS = re.compile(
    r".*\.((q|k|v|o|gate|up|down|gate_up|qkv|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa|fc1|fc2"
    r"|query_key_value|dense_h_to_4h|dense_4h_to_h|experts\.\d+\.w[123])\.weight"
)
_OTHER_TOWERS = re.compile(r"(.*[._])?(vision|visual|audio|image|speech)[a-z_]*\..*")
_EXPERTS = re.compile(r"(.*\.experts)\..*")


@record
class Form:
    """How one output tensor is stored: encoded afresh, or copied byte for byte."""

    dtype: str  # kind of the codes
    encoding: Encoding | None = None
    copied: tuple[tuple[str, TensorEntry], ...] = ()  # stored tensors by their output's names


class SameForms:
    """Form of an output without a dtype: quantised inputs give the form of the first."""

    def __init__(self, untouched: Untouched) -> None:
        """``untouched``: whether a tensor's inputs and its output are one stored tensor."""
        self._untouched = untouched

    def of(
        self, name: str, entries: Sequence[TensorEntry], own: Sequence[TensorEntry]
    ) -> Form | None:
        """A tensor's form; None for a plain one.

        Args:
            entries: of all inputs.
            own: of the models, without those that are the base's; may be empty.

        Raises:
            InputError: some models have plain values, or the form cannot be written.
        """
        chosen = own or entries
        quantised = [entry for entry in chosen if is_quantised(entry)]
        if not quantised:
            return None
        if len(quantised) < len(chosen):
            plain = next(entry for entry in chosen if not is_quantised(entry))
            rule = f"{quantised[0].file}: {name}: is {quantised[0].dtype}, {plain.dtype} in"
            raise OptionError(f"{rule} {plain.file}", "dtype", "{} chooses one")
        source = _source(chosen[0])
        if source is not None and self._untouched(name, entries):
            stem = stem_of(name)
            return Form(source.dtype, None, tuple((stem + rest, e) for rest, e in source.parts))
        encoding = same_encoding(name, source) if source else None
        if encoding is None:
            raise _unwritable(name, chosen[0], source)
        return Form(encoding.code, encoding)

    def config(self, tensors: Iterable[tuple[str, Sequence[int], bool]]) -> None:
        """The inputs' own quantization_config holds."""
        return None


class BlockForms:
    """Form of dtype fp8-block128: E4M3 in blocks of 128 x 128 for linear layers."""

    def __init__(self, tensors: Mapping[str, TensorEntry]) -> None:
        """``tensors``: of the model that gives the config.

        Raises:
            InputError: no tensor can be written so.
        """
        known = any(is_quantised(entry) for entry in tensors.values())
        wanted = {
            name
            for name, entry in tensors.items()
            if name.endswith(".weight") and (is_quantised(entry) if known else _is_linear(name))
        }
        fitting = {name for name in wanted if _fits(tensors[name].shape)}
        # Experts become one module: all of them are quantised, or none.
        whole = {_experts(name) for name in tensors if is_float(tensors[name])} - {
            _experts(name) for name in tensors if name not in fitting
        }
        self._names = {name for name in fitting if _experts(name) in (None, *whole)}
        self._is_power = any(
            grid.code == "F8_E8M0"
            for entry in tensors.values()
            for source in [_source(entry)]
            if source is not None and source.dtype.startswith("F8_")
            for grid in source.scales
        )
        if not self._names:
            path = next(iter(tensors.values())).file.parent
            raise InputError(
                f"{path}: dtype {FP8_BLOCK}: holds no linear layer whose rows and "
                f"columns are multiples of {BLOCK}"
            )

    def of(
        self, name: str, entries: Sequence[TensorEntry], own: Sequence[TensorEntry]
    ) -> Form | None:
        """A tensor's form; None for a plain one."""
        if name not in self._names:
            return None
        encoding = block_encoding(name, entries[0].shape, self._is_power)
        return Form(encoding.code, encoding)

    def config(self, tensors: Iterable[tuple[str, Sequence[int], bool]]) -> dict[str, Any]:
        """quantization_config as transformers reads it.

        Args:
            tensors: name, shape and whether it is quantised, of every output tensor.
        """
        plain = {"lm_head"}  # a tied one is not among the tensors
        for name, shape, is_encoded in tensors:
            module = stem_of(name) if name.endswith(".weight") else name.rpartition(".")[0]
            if is_encoded:
                plain.discard(module)
            elif len(shape) > 1:
                plain.add(_experts(name) or module)
        values: dict[str, Any] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": sorted(plain),
        }
        return values | ({"scale_fmt": "ue8m0"} if self._is_power else {})


Forms = SameForms | BlockForms


def _source(entry: TensorEntry) -> DecodedEntry | None:
    """The quantised tensor whose form an entry has, under changes of an adapter too."""
    if isinstance(entry, ChangedEntry) and entry.source is not None:
        return _source(entry.source)
    return quantised_source(entry)


def _unwritable(name: str, entry: TensorEntry, source: DecodedEntry | None) -> OptionError:
    form = (source.form or source.dtype) if source else "joined from quantised tensors"
    extra = [rest for rest, _ in source.parts[2:]] if source else []
    reason = f" with {', '.join(extra)}" if source and source.form.startswith("fp8") else ""
    rule = f"{entry.file}: {name}: is {form}{reason}, which cannot be written with new values"
    return OptionError(rule, "dtype", f"{{}} must choose, bf16 or {FP8_BLOCK}")


def _is_linear(name: str) -> bool:
    return bool(_LINEARS.fullmatch(name)) and not _OTHER_TOWERS.fullmatch(name)


def _fits(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and not shape[0] % BLOCK and not shape[1] % BLOCK and min(shape) > 0


def _experts(name: str) -> str | None:
    match = _EXPERTS.fullmatch(name)
    return match[1] if match else None
