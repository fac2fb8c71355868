"""The declaration of a merge method: name, formula, numbers, and how the engine runs it."""

from typing import Literal

from merit_fast.merge.parameters import Parameter
from merit_fast.merge.rules.function import UserFunction
from merit_fast.merge.rules.kinds import ElementByElement, FromGram, ThinnedDeltas, WeightedSum
from merit_fast.records import field, record

# How a method uses the base: always; only with a scale other than 1; if there is one; never.
Base = Literal["required", "with scale", "optional", "unused"]


@record
class MergekitForm:
    """Use of the method of the same name in mergekit's recipes.

    Attributes:
        keys: parameters that it reads next to those of ours.
        normalize: its default of ``normalize``.
        rescale: its default of ``rescale``; None: it takes none.
        base: how its ``base_model`` enters: as the base, as the first model or as one model of
            many.
        uneven: whether slices may list different numbers of models.
    """

    keys: tuple[str, ...] = ()
    normalize: bool = False
    rescale: bool | None = None
    base: Literal["base", "first model", "model"] = "base"
    uneven: bool = False


@record
class MergeMethod:
    """A merge method.

    Attributes:
        name: the value of ``method``.
        rule: its kind, with the function that makes a tensor's coefficients or delta rule.
        result: its formula, in Markdown.
        source: the paper.
        parameters: the numbers it takes.
        takes_weights: whether models have weights.
        takes_seed: whether it draws random numbers.
        base: how it uses the base.
        fewest_models, most_models: how many models it takes.
        passes: how often it reads its inputs, at most.
        rescales: whether ``rescale`` changes how it enlarges the deltas that it keeps.
        mergekit: how mergekit's recipes use it.
    """

    name: str
    rule: WeightedSum | FromGram | ThinnedDeltas | ElementByElement | UserFunction
    result: str
    source: str
    parameters: tuple[Parameter, ...] = ()
    takes_weights: bool = True
    takes_seed: bool = False
    base: Base = "required"
    fewest_models: int = 1
    most_models: int | None = None
    passes: int = 1
    rescales: bool = False
    mergekit: MergekitForm = field(default_factory=MergekitForm)

    def takes(self, name: str) -> bool:
        """Whether the method takes a parameter of this name."""
        if name == "weights":
            return self.takes_weights
        if name == "seed":
            return self.takes_seed
        return any(parameter.name == name for parameter in self.parameters)

    def takes_by_model(self, name: str) -> bool:
        """Whether every model may have a parameter of this name."""
        return any(item.name == name and item.by_model for item in self.parameters)

    @property
    def takes_vectors(self) -> bool:
        """Whether it can weigh rows and columns of a tensor by themselves."""
        return isinstance(self.rule, FromGram) and self.rule.by_vector is not None

    @property
    def is_sum(self) -> bool:
        """Whether the result is a weighted sum of whole tensors."""
        return isinstance(self.rule, (WeightedSum, FromGram))
