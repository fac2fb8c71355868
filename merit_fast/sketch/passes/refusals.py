"""Parameters that no tap covers: kept for a backward pass per example, or refused in one line."""

import re
from collections.abc import Collection, Mapping
from typing import Literal, NoReturn

from torch import nn

from merit_fast.errors import MeritFastError
from merit_fast.sketch.capture.layout import Refusal, RepeatBatch

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Uncovered:
    """Parameters that no tap covers.

    Attributes:
        slow: name -> reason, words that follow "parameter NAME".
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        policy: Literal["autograd", "error"],
    ) -> None:
        self.parameters = parameters
        self.policy = policy
        self.slow: dict[str, str] = {}
        self._classes = _classes_of(model, parameters)

    def add(self, refusal: Refusal) -> None:
        for name in refusal.site.owned.values():
            self.slow.setdefault(name, f"of {self._classes[name]} {refusal.reason}")

    def add_stray(self, name: str, function: str) -> None:
        self.slow.setdefault(name, f"is used outside its module's forward, in {function}")

    def add_wrong(self, wrong: Mapping[str, float], what: str) -> None:
        """Adds parameters whose sketches are not autograd's: name -> relative error."""
        for name, error in wrong.items():
            reason = f"fails the check: {what} differs from autograd by {error:.2g}"
            self.slow.setdefault(name, f"of {self._classes[name]} {reason}")

    def require_allowed(self) -> None:
        """Raises MeritFastError with all of them if the policy is "error"."""
        if self.slow and self.policy == "error":
            message = list_refused(self.slow, self.parameters)
            self.slow.clear()
            raise MeritFastError(message)

    def repeat(self, name: str) -> NoReturn:
        raise RepeatBatch(
            f"sketch_gradients: parameter {name} {self.slow[name]}: it takes a backward pass per "
            "example from now on; run this batch again"
        )

    def need_rows(self, reason: str) -> NoReturn:
        name, why = next(iter(self.slow.items()))
        raise MeritFastError(
            f"sketch_gradients: parameter {name} {why}, and {reason}: give batches of one example, "
            "or leave it out"
        )

    def describe(self) -> str:
        """One line: their number, their share of all entries, and what they cost."""
        entries = sum(parameter.numel() for parameter in self.parameters.values())
        share = sum(self.parameters[name].numel() for name in self.slow) / entries
        first, reason = next(iter(self.slow.items()))
        return (
            f"sketch: {len(self.slow)} of {len(self.parameters)} parameters ({share:.1%} of the "
            "entries) take a backward pass per example, at no extra cost in batches of one; "
            f"such as {first}, which {reason}"
        )


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


def _classes_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Name of a parameter -> class of the first module that owns it."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    classes: dict[str, str] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in names:
                classes.setdefault(names[id(parameter)], type(module).__name__)
    return classes
