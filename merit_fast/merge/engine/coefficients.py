"""The factor of each input in a merge, for the summary."""

from merit_fast.merge.engine.plan import Rule, named_entry
from merit_fast.merge.engine.prepare import Inputs
from merit_fast.merge.read.entries import is_float


def input_coefficients(inputs: Inputs) -> list[tuple[str, float | None]]:
    """Each input's coefficient; None where it differs between tensors or there is none."""
    combination = inputs.combination
    rules: set[Rule] = set()
    if combination.from_gram is None:
        tensors = (tensor for file in inputs.files for tensor in file.tensors)
        entries = (named_entry(tensor) for tensor in tensors if is_float(tensor.inputs[0]))
        for rule in map(combination.rule, entries):
            rules.add(rule)
            if len(rules) > 1:
                break
    only = rules.pop() if len(rules) == 1 else None
    numbers: tuple[float | None, ...] = only if isinstance(only, tuple) else ()
    paths = combination.paths
    filled = (*numbers, *[None] * (len(paths) - len(numbers)))
    return [(str(path), number) for path, number in zip(paths, filled, strict=True)]
