"""A LoRA layer's changes of one tensor: linear layers, embeddings, convolutions, biases, DoRA."""

from merit_fast.errors import InputError
from merit_fast.merge.read.adapters.folder import ADAPTER_CONFIG
from merit_fast.merge.read.adapters.keys import Layer
from merit_fast.merge.read.entries import Added, Change, LowRank, Magnitude, TensorEntry, is_float


def stored_transposed(layer: Layer, shape: tuple[int, ...]) -> bool | None:
    """Whether a layer's matrix is stored as [in, out]. None: it is square, so shapes do not tell.

    Raises:
        InputError: the factors fit neither way; a grouped convolution, whose LoRA is no change of
            its weights.
    """
    a = layer.a.shape
    b = layer.b.shape
    if len(a) < 2 or len(a) != len(b):
        raise _unfit(layer, shape)
    if len(a) > 2:
        groups = a[0] // b[1] if b[1] and a[0] % b[1] == 0 else 1
        if groups > 1:
            raise InputError(
                f"{layer.a.file}: {layer.a.name}: its convolution has {groups} groups, for which "
                "no change of the weights does what LoRA does; PEFT does not merge it either"
            )
        if (b[0], *a[1:]) != shape or any(size != 1 for size in b[2:]):
            raise _unfit(layer, shape)
        return False
    made = (b[0], a[1])
    if made == shape and made[0] == made[1]:
        return layer.is_embedding or None
    if made == shape and not layer.is_embedding:
        return False
    if made[::-1] == shape:
        return True
    raise _unfit(layer, shape)


def layer_changes(
    layer: Layer,
    target: TensorEntry,
    rank_and_scaling: tuple[int, float],
    transposed: bool,
    *,
    use_dora: bool,
) -> tuple[Change, ...]:
    """A layer's changes of its weight: the product, then with DoRA the lengths of its vectors.

    Raises:
        InputError: the rank is not the config's; a magnitude is missing, surplus or of another
            size.
    """
    rank, scaling = rank_and_scaling
    check_rank(layer, rank, layer.a.shape[0], layer.b.shape[1])
    if not is_float(target):
        raise _unfit(layer, target)
    product = LowRank(target.name, layer.a, layer.b, scaling, transposed)
    lengths = layer.magnitude
    if use_dora and lengths is None:
        raise InputError(
            f"{layer.a.file}: {layer.a.name}: has no lora_magnitude_vector next to it, which "
            f"use_dora of {ADAPTER_CONFIG} needs"
        )
    if lengths is None:
        return (product,)
    if not use_dora:
        raise InputError(
            f"{lengths.file}: {lengths.name}: belongs to DoRA, {ADAPTER_CONFIG} has no use_dora"
        )
    out = layer.b.shape[0]
    if lengths.num_elements != out:
        raise InputError(
            f"{lengths.file}: {lengths.name}: must have {out} elements, got {list(lengths.shape)}"
        )
    return product, Magnitude(lengths, transposed)


def bias_change(layer: Layer, target: TensorEntry | None, scaling: float) -> Added | None:
    """The change of a layer's bias by lora_bias; None where it has none.

    Raises:
        InputError: the base's layer has no bias, or one of another size.
    """
    bias = layer.bias
    if bias is None:
        return None
    if target is None or target.shape != bias.shape or not is_float(target):
        found = "no such tensor" if target is None else str(list(target.shape))
        raise InputError(
            f"{bias.file}: {bias.name}: changes {layer.module}.bias as a float tensor of "
            f"{list(bias.shape)}, the base has {found}"
        )
    return Added(bias, scaling)


def check_rank(layer: Layer, rank: int, *sizes: int) -> None:
    """Raises InputError unless both factors' sizes are the rank; ``sizes``: of A, of B."""
    for entry, size in zip((layer.a, layer.b), sizes, strict=True):
        if size != rank:
            raise InputError(
                f"{entry.file}: {entry.name}: must be of rank {rank} by {ADAPTER_CONFIG}, got "
                f"{size}"
            )


def _unfit(layer: Layer, target: TensorEntry | tuple[int, ...]) -> InputError:
    a = layer.a.shape
    b = layer.b.shape
    made = [b[0], *a[1:]] if len(a) >= 2 and len(b) >= 2 else f"{list(b)} @ {list(a)}"
    made = made[::-1] if layer.is_embedding and len(made) == 2 else made
    found = list(target) if isinstance(target, tuple) else f"{target.dtype} {list(target.shape)}"
    return InputError(
        f"{layer.a.file}: {layer.a.name}: changes {layer.module}.weight as a float tensor of "
        f"{made}, the base has {found}"
    )
