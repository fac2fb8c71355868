"""Words for parameters that no tap covers."""

import re
from collections.abc import Collection, Mapping

from torch import nn

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def list_refused(slow: Mapping[str, str], names: Collection[str]) -> str:
    """One line with every refused parameter, and the regex that leaves them out."""
    first, reason = next(iter(slow.items()))
    others = [name for name in slow if name != first]
    more = f" (and {len(others)} more: {', '.join(others)})" if others else ""
    return (
        f"sketch_gradients: parameter {first} {reason}{more}; leave it out "
        f"(requires_grad_(False), or parameters={leaving_out(slow, names)!r}), or give "
        "uncovered='autograd': a backward pass per example"
    )


def leaving_out(refused: Collection[str], names: Collection[str]) -> str:
    """A regular expression that selects all names but the refused ones."""
    patterns = []
    for name in refused:
        pattern = re.escape(_NUMBER.sub("0", name)).replace(r"\.0\.", r"\.\d+\.")
        others = [other for other in names if other not in refused]
        if any(re.fullmatch(pattern, other) for other in others):
            pattern = re.escape(name)
        if pattern not in patterns:
            patterns.append(pattern)
    return f"^(?!(?:{'|'.join(patterns)})$)"


def describe_slow(slow: Mapping[str, str], parameters: Mapping[str, nn.Parameter]) -> str:
    """One line: number of slow parameters, their share of all entries, and what they cost."""
    entries = sum(parameter.numel() for parameter in parameters.values())
    share = sum(parameters[name].numel() for name in slow) / entries
    first, reason = next(iter(slow.items()))
    return (
        f"sketch: {len(slow)} of {len(parameters)} parameters ({share:.1%} of the entries) take a "
        f"backward pass per example, at no extra cost in batches of one; such as {first} {reason}"
    )
