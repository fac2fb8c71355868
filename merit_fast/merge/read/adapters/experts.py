"""LoRA of parameters (``target_parameters``): which wrapper changes which parameter, and how.

PEFT nests one wrapper per parameter of a module, in the order of ``named_parameters()``: the first
parameter's is the innermost. Shapes are checked against that order, and decide where it is unknown.
"""

from collections.abc import Iterator, Sequence
from itertools import permutations

from merit_fast.errors import InputError
from merit_fast.merge.read.adapters.config import AdapterConfig, Scalings
from merit_fast.merge.read.adapters.keys import Layer
from merit_fast.merge.read.adapters.modules import check_rank
from merit_fast.merge.read.entries import Change, ExpertsLowRank, LowRank, TensorEntry, is_float

# The order in which transformers' experts register their parameters.
PARAMETER_ORDER = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "gate_proj",
    "up_proj",
    "down_proj",
    "down_proj_bias",
)
# Models whose experts store [E, in, out] and say so (``is_transposed``): PEFT reads them that way.
TRANSPOSED_MODELS = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")
ATTENTION = "in_proj_weight"  # of torch's MultiheadAttention, which PEFT targets as a module
_MAX_PARAMETERS = 6  # of one module; bounds the orders that are tried
_LAST_UNSWAPPED = (0, 18)  # up to this PEFT reads every [E, d1, d2] as [E, in, out]
Pair = tuple[Layer, TensorEntry]


def match_parameters(
    module: str, layers: Sequence[Layer], candidates: Sequence[TensorEntry], scalings: Scalings
) -> list[Pair]:
    """Each wrapper of a module with the parameter that it changes.

    Args:
        module: its name.
        layers: its wrappers.
        candidates: the module's parameters that the config's target_parameters name.
        scalings: ranks by the parameter's name.

    Raises:
        InputError: there are not as many parameters as wrappers; no order fits; several do.
    """
    first = layers[0].a
    if len(layers) != len(candidates) or len(layers) > _MAX_PARAMETERS:
        names = ", ".join(entry.name for entry in candidates) or "none"
        raise InputError(
            f"{first.file}: {first.name}: {len(layers)} LoRA layers of {module} must change as "
            f"many of the base's tensors that target_parameters names, got {names}"
        )
    inner_first = sorted(layers, key=lambda layer: -layer.depth)
    fitting = [
        list(zip(inner_first, order, strict=True))
        for order in permutations(candidates)
        if all(
            _fits(layer, entry, scalings) for layer, entry in zip(inner_first, order, strict=True)
        )
    ]
    if not fitting:
        shapes = ", ".join(f"{entry.name} {list(entry.shape)}" for entry in candidates)
        raise InputError(
            f"{first.file}: {first.name}: {list(first.shape)} and lora_B "
            f"{list(layers[0].b.shape)} must change a float tensor of their shape and of the "
            f"rank in adapter_config.json, the base has {shapes}"
        )
    ordered = [pairs for pairs in fitting if _is_known_order([entry for _, entry in pairs])]
    if len(fitting) > 1 and len(ordered) != 1:
        raise InputError(
            f"{first.file}: {first.name}: fits more than one parameter of {module}, and the "
            "order of its parameters is not known"
        )
    return ordered[0] if len(fitting) > 1 else fitting[0]


def parameter_changes(
    pairs: Sequence[Pair], config: AdapterConfig, scalings: Scalings, model_type: str | None
) -> Iterator[tuple[str, Change]]:
    """(name of the base's tensor, change) of each parameter.

    Raises:
        InputError: experts are square matrices and nothing tells how they are stored.
    """
    known = {_orientation(layer, entry) for layer, entry in pairs if len(entry.shape) == 3}
    known.discard(None)
    for layer, entry in pairs:
        rank, scaling = scalings.of(_looked_up(entry))
        if len(entry.shape) == 2:
            check_rank(layer, rank, layer.a.shape[0], layer.b.shape[1])
            yield entry.name, LowRank(entry.name, layer.a, layer.b, scaling, transposed=False)
            continue
        transposed = _orientation(layer, entry)
        if transposed is None:
            transposed = known.copy().pop() if len(known) == 1 else None
        if transposed is None:
            transposed = _by_version(layer, config, model_type)
        experts = entry.shape[0]
        yield entry.name, ExpertsLowRank(layer.a, layer.b, scaling, experts, transposed)


def _looked_up(entry: TensorEntry) -> str:
    """The name under which PEFT looks a rank up: the parameter's, or torch's attention's."""
    return entry.name.removesuffix(f".{ATTENTION}")


def _fits(layer: Layer, entry: TensorEntry, scalings: Scalings) -> bool:
    """Whether a wrapper's factors have the shapes of a parameter's, in either orientation."""
    a = layer.a.shape
    b = layer.b.shape
    if len(a) != 2 or len(b) != 2 or not is_float(entry):
        return False
    rank, _ = scalings.of(_looked_up(entry))
    matrix = entry.shape[1:] if len(entry.shape) == 3 else entry.shape
    experts = entry.shape[0] if len(entry.shape) == 3 else 1
    if len(matrix) != 2 or a[0] != rank * experts or b[1] != rank * experts:
        return False
    made = (b[0], a[1])
    return made == matrix or (made[::-1] == matrix and len(entry.shape) == 3)


def _orientation(layer: Layer, entry: TensorEntry) -> bool | None:
    """Whether each expert's change is transposed; None for square ones."""
    matrix = entry.shape[1:]
    if matrix[0] == matrix[1]:
        return None
    return (layer.b.shape[0], layer.a.shape[1]) != matrix


def _by_version(layer: Layer, config: AdapterConfig, model_type: str | None) -> bool:
    version = config.peft_number
    if version is None or model_type is None:
        lacking = "peft_version" if version is None else "the base's model_type"
        raise InputError(
            f"{layer.a.file}: {layer.a.name}: changes square experts, for which only "
            f"{lacking} could tell whether they are stored as [in, out]"
        )
    return version <= _LAST_UNSWAPPED or model_type in TRANSPOSED_MODELS


def _is_known_order(entries: Sequence[TensorEntry]) -> bool:
    leaves = [entry.name.rpartition(".")[2] for entry in entries]
    if not all(leaf in PARAMETER_ORDER for leaf in leaves):
        return False
    places = [PARAMETER_ORDER.index(leaf) for leaf in leaves]
    return places == sorted(places)
