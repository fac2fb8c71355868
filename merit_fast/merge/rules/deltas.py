"""Delta rules of the methods that thin every model's delta from the base before they sum."""

from merit_fast.errors import InputError
from merit_fast.kernels.average.deltas import DeltaRule
from merit_fast.merge.rules.values import TensorValues
from merit_fast.records import replace


def ties_rule(values: TensorValues) -> DeltaRule:
    """Keeps each delta's largest elements and elects a sign per element."""
    count = values.num_elements
    keep = tuple(
        max(1, int(share * count)) if share > 0 else 0 for share in values.by_model("density")
    )
    rule = _weighted(values, elect=True)
    top = (0,) * values.count
    return replace(rule, top=top, keep=keep, restore_sizes=bool(values.rescale))


def breadcrumbs_rule(values: TensorValues) -> DeltaRule:
    """Drops each delta's largest and smallest elements."""
    return _breadcrumbs(values, elect=False)


def breadcrumbs_ties_rule(values: TensorValues) -> DeltaRule:
    """Drops each delta's largest and smallest elements, then elects a sign per element."""
    return _breadcrumbs(values, elect=True)


def dare_linear_rule(values: TensorValues) -> DeltaRule:
    """Drops elements at random and divides the rest by the keep probability."""
    return _thinned_at_random(values, elect=False)


def dare_ties_rule(values: TensorValues) -> DeltaRule:
    """Drops elements at random, then elects a sign per element."""
    return _thinned_at_random(values, elect=True)


def della_linear_rule(values: TensorValues) -> DeltaRule:
    """Drops elements at random, large ones of a row less often."""
    return _thinned_by_rank(values, elect=False)


def della_rule(values: TensorValues) -> DeltaRule:
    """Drops elements at random, large ones of a row less often, then elects a sign per element."""
    return _thinned_by_rank(values, elect=True)


def sce_rule(values: TensorValues) -> DeltaRule:
    """Keeps the elements that vary most, weighs models by their squares, elects signs."""
    return DeltaRule(
        (1.0,) * values.count,
        variance_share=values.of("select_topk"),
        elect=True,
        normalize=True,
        weigh_by_squares=True,
        scale=values.of("scale"),
    )


def _weighted(values: TensorValues, elect: bool) -> DeltaRule:
    return DeltaRule(
        values.weights(),
        elect=elect,
        normalize=elect and values.normalize,
        scale=values.of("scale"),
    )


def _breadcrumbs(values: TensorValues, elect: bool) -> DeltaRule:
    ranks = [
        _middle_ranks(values.num_elements, density, gamma)
        for density, gamma in zip(values.by_model("density"), values.by_model("gamma"), strict=True)
    ]
    top = tuple(top for top, _ in ranks)
    keep = tuple(keep for _, keep in ranks)
    rule = _weighted(values, elect)
    return replace(rule, top=top, keep=keep, restore_sizes=bool(values.rescale))


def _middle_ranks(count: int, density: float, gamma: float) -> tuple[int, int]:
    """Numbers of elements: the largest that are dropped, and those after them that are kept."""
    if density >= 1.0:
        return 0, count
    keep = int(density * count)
    below = max(0, count - keep - int(gamma * count))
    return count - below - keep, keep


def _thinned_at_random(values: TensorValues, elect: bool) -> DeltaRule:
    return replace(
        _weighted(values, elect),
        stream=tuple(_stream(values.seed, values.name, k) for k in range(values.count)),
        density=values.by_model("density"),
        epsilon=(0.0,) * values.count,
        divide=values.rescale is not False,
    )


def _thinned_by_rank(values: TensorValues, elect: bool) -> DeltaRule:
    rule = _thinned_at_random(values, elect)
    epsilon = tuple(
        spread if 0 < share < 1 else 0.0
        for share, spread in zip(rule.density, values.by_model("epsilon"), strict=True)
    )
    for share, spread in zip(rule.density, epsilon, strict=True):
        if spread and (share - spread <= 0 or share + spread >= 1):
            raise InputError(
                f"merge: {values.name}: density +- epsilon must lie between 0 and 1, "
                f"got {share:g} +- {spread:g}"
            )
    return replace(rule, epsilon=epsilon, row=values.shape[-1] if values.shape else 1)


def _stream(seed: int, name: str, model: int) -> int:
    """Key of one model's random numbers for one tensor."""
    import hashlib

    digest = hashlib.sha256(f"{seed}\0{name}\0{model}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")
