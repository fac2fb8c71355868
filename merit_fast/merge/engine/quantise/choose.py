"""The quantised form of an output, from the options and the inputs."""

from collections.abc import Sequence

from merit_fast.merge.combine.combination import Combination
from merit_fast.merge.config import FP8_BLOCK, MergeConfig
from merit_fast.merge.engine.layout import OutputFile
from merit_fast.merge.engine.quantise.forms import BlockForms, Forms, SameForms, Untouched
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.entries import TensorEntry, is_quantised, quantised_source
from merit_fast.merge.read.files import folder_of
from merit_fast.merge.read.quantised.scheme import read_scheme
from merit_fast.merge.read.remote import Location
from merit_fast.merge.rules.function import FunctionRule
from merit_fast.options.fields import require


def choose_forms(
    config: MergeConfig,
    combination: Combination,
    checkpoints: Sequence[Checkpoint],
    companions: Location,
) -> Forms | None:
    """The forms of the output's quantised tensors; None where ``dtype`` makes all tensors plain.

    Args:
        companions: the directory that gives config.json.
    """
    if config.form == "distcp":
        require(config.dtype != FP8_BLOCK, "dtype", "plain with form distcp", config.dtype)
        return None
    if config.dtype == FP8_BLOCK:
        given = [each for each in checkpoints if folder_of(each.path) == companions]
        return BlockForms((given or checkpoints)[0].tensors)
    return None if config.dtype else SameForms(_untouched(combination))


def check_config(checkpoints: Sequence[Checkpoint], companions: Location) -> None:
    """Checks that config.json describes an output in the inputs' own form.

    Raises:
        InputError: it names another method than the first quantised model, or a quantised cache,
            whose scales no weight has.
    """
    scheme = read_scheme(companions)
    methods = (
        {read_scheme(folder_of(each.path)).method: each.path for each in checkpoints[::-1]}
        if (companions / "config.json").exists()
        else {}
    )
    others = [path for method, path in methods.items() if method and method != scheme.method]
    if others:
        rule = f"{companions}: quantization_config: must be that of {others[0]}"
        raise OptionError(rule, "dtype", "or {} must choose")
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        if scheme.values and scheme.values.get(key):
            rule = f"{scheme.file}: {key}: scales of a cache are not written"
            raise OptionError(rule, "dtype", "{} must choose")


def reads_codes(files: Sequence[OutputFile]) -> bool:
    """Whether some tensor of an output is made of quantised ones."""
    tensors = (tensor for file in files for tensor in file.tensors)
    return any(is_quantised(entry) for tensor in tensors for entry in tensor.inputs)


def _untouched(combination: Combination) -> Untouched:
    """Whether a tensor's inputs are one stored tensor, which the method gives back."""

    def is_untouched(name: str, entries: Sequence[TensorEntry]) -> bool:
        used = list(entries)
        if combination.from_gram is None:
            first = entries[0]
            place = (first.dtype, first.shape, first.file, first.offset, first.num_bytes)
            rule = combination.rule(TensorEntry(name, *place))
            if isinstance(rule, FunctionRule):
                return False
            if isinstance(rule, tuple):
                if abs(sum(rule) - 1.0) > 1e-12:
                    return False
                used = [entry for entry, c in zip(entries, rule, strict=False) if c]
        sources = [quantised_source(entry) for entry in used]
        places = {(source.file, source.offset) if source else None for source in sources}
        return len(places) == 1 and None not in places

    return is_untouched
