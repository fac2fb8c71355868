"""One declaration per merge method, for checks, help, the engine, mergekit's reader and docs.

To add a method, add its entry here and its rule in rules/; docs/method.md holds the printed table.
"""

from dataclasses import dataclass, field
from typing import Literal

from merit_fast.merge.parameters import (
    DENSITY,
    EPSILON,
    GAMMA,
    SCALE,
    SELECT_TOPK,
    Parameter,
    T,
)
from merit_fast.merge.rules import deltas, gram, sums
from merit_fast.merge.rules.function import UserFunction
from merit_fast.merge.rules.kinds import FromGram, ThinnedDeltas, WeightedSum

# How a method uses the base: always; only with a scale other than 1; if there is one; never.
Base = Literal["required", "with scale", "optional", "unused"]


@dataclass(frozen=True)
class MergekitForm:
    """Use of the method of the same name in mergekit's recipes.

    Attributes:
        keys: parameters that it reads next to those of ours.
        normalize: its default of ``normalize``.
        rescale: the value of ``rescale`` that equals our formula; None: it takes none.
        base: how its ``base_model`` enters: as the base, as the first model or as one model of
            many.
        uneven: whether slices may list different numbers of models.
    """

    keys: tuple[str, ...] = ()
    normalize: bool = False
    rescale: bool | None = None
    base: Literal["base", "first model", "model"] = "base"
    uneven: bool = False


@dataclass(frozen=True)
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
        mergekit: how mergekit's recipes use it.
    """

    name: str
    rule: WeightedSum | FromGram | ThinnedDeltas | UserFunction
    result: str
    source: str
    parameters: tuple[Parameter, ...] = ()
    takes_weights: bool = True
    takes_seed: bool = False
    base: Base = "required"
    fewest_models: int = 1
    most_models: int | None = None
    passes: int = 1
    mergekit: MergekitForm = field(default_factory=MergekitForm)

    def takes(self, name: str) -> bool:
        """Whether the method takes a parameter of this name."""
        if name == "weights":
            return self.takes_weights
        if name == "seed":
            return self.takes_seed
        return any(parameter.name == name for parameter in self.parameters)

    @property
    def is_sum(self) -> bool:
        """Whether the result is a weighted sum of whole tensors."""
        return isinstance(self.rule, (WeightedSum, FromGram))


_SUM = ("normalize", "lambda")
_DARE = "Yu et al. 2024, arXiv 2311.03099"
_BREADCRUMBS = "Davari & Belilovsky 2024, arXiv 2312.06795"
_DELLA = "Deep et al. 2024, arXiv 2406.11617"

_ENTRIES = (
    MergeMethod(
        "linear",
        WeightedSum(sums.linear_coefficients, lambda unscaled, whole: not unscaled),
        "θ0 + s (Σ w_k θ_k − θ0); no base needed with s = 1",
        "Wortsman et al. 2022, arXiv 2203.05482",
        (SCALE,),
        base="with scale",
        mergekit=MergekitForm(("normalize",), normalize=True, base="model", uneven=True),
    ),
    MergeMethod(
        "task_arithmetic",
        WeightedSum(sums.task_arithmetic_coefficients, lambda unscaled, whole: not whole),
        "θ0 + s Σ w_k δ_k",
        "Ilharco et al. 2023, arXiv 2212.04089",
        (SCALE,),
        mergekit=MergekitForm(_SUM),
    ),
    MergeMethod(
        "ties",
        ThinnedDeltas(deltas.ties_rule),
        "θ0 + s elect_k(w_k · the density·n largest of δ_k, at least one)",
        "Yadav et al. 2023, arXiv 2306.01708",
        (DENSITY, SCALE),
        passes=3,
        mergekit=MergekitForm(_SUM, normalize=True, rescale=False),
    ),
    MergeMethod(
        "dare_linear",
        ThinnedDeltas(deltas.dare_linear_rule),
        "θ0 + s Σ w_k (δ_k / p where u < p, else 0), p the `density`",
        _DARE,
        (DENSITY, SCALE),
        takes_seed=True,
        mergekit=MergekitForm(_SUM, rescale=True),
    ),
    MergeMethod(
        "dare_ties",
        ThinnedDeltas(deltas.dare_ties_rule),
        "`dare_linear` with elect in place of Σ",
        _DARE,
        (DENSITY, SCALE),
        takes_seed=True,
        mergekit=MergekitForm(_SUM, rescale=True),
    ),
    MergeMethod(
        "breadcrumbs",
        ThinnedDeltas(deltas.breadcrumbs_rule),
        "θ0 + s Σ w_k · (δ_k without its gamma·n largest, of the rest the density·n largest)",
        _BREADCRUMBS,
        (DENSITY, GAMMA, SCALE),
        passes=3,
        mergekit=MergekitForm(_SUM, rescale=False),
    ),
    MergeMethod(
        "breadcrumbs_ties",
        ThinnedDeltas(deltas.breadcrumbs_ties_rule),
        "`breadcrumbs` with elect in place of Σ",
        _BREADCRUMBS,
        (DENSITY, GAMMA, SCALE),
        passes=3,
        mergekit=MergekitForm(_SUM, rescale=False),
    ),
    MergeMethod(
        "della",
        ThinnedDeltas(deltas.della_rule, by_row=True),
        "`dare_ties` with p = density − ε + 2ε · rank/(row − 1), rank by rising size in the row "
        "(last dimension)",
        _DELLA,
        (DENSITY, EPSILON, SCALE),
        takes_seed=True,
        mergekit=MergekitForm(_SUM, normalize=True, rescale=True),
    ),
    MergeMethod(
        "della_linear",
        ThinnedDeltas(deltas.della_linear_rule, by_row=True),
        "`della` with Σ in place of elect",
        _DELLA,
        (DENSITY, EPSILON, SCALE),
        takes_seed=True,
        mergekit=MergekitForm(_SUM, rescale=True),
    ),
    MergeMethod(
        "sce",
        ThinnedDeltas(deltas.sce_rule, by_squares=True),
        "where the δ_k vary most (share `select_topk` of the elements with variance > 0): "
        "θ0 + s elect_k(w_k δ_k), w_k the shares of Σ δ_k²",
        "Wan et al. 2024, arXiv 2408.07990",
        (SELECT_TOPK, SCALE),
        takes_weights=False,
        passes=5,
    ),
    MergeMethod(
        "slerp",
        FromGram(gram.slerp),
        "sin((1 − t)ω)/sin ω θ_1 + sin(tω)/sin ω θ_2, ω the angle between the two; "
        r"a straight line where \|cos ω\| > 0.9995",
        "Shoemake 1985",
        (T,),
        takes_weights=False,
        base="unused",
        fewest_models=2,
        most_models=2,
        passes=2,
        mergekit=MergekitForm(base="first model"),
    ),
    MergeMethod(
        "multislerp",
        FromGram(gram.multislerp),
        r"(cos a · m + sin a · T/a) Σ w_k \|x_k\|, u_k = x_k/\|x_k\|, m the direction of "
        r"Σ w_k u_k, T = Σ w_k (u_k − ⟨u_k, m⟩ m), a = \|T\|; x_k = θ_k, or δ_k with a base",
        "mergekit",
        base="optional",
        passes=2,
        mergekit=MergekitForm(("normalize_weights", "eps"), normalize=True),
    ),
    MergeMethod(
        "model_stock",
        FromGram(gram.model_stock),
        "θ0 + c · mean δ_k, c = K cosine / (1 + (K − 1) cosine), cosine the mean over pairs of "
        "deltas",
        "Jang et al. 2024, arXiv 2403.19522",
        takes_weights=False,
        fewest_models=2,
        passes=2,
        mergekit=MergekitForm(("filter_wise",)),
    ),
    MergeMethod(
        "passthrough",
        WeightedSum(sums.passthrough_coefficients, lambda unscaled, whole: False),
        "s θ_1",
        "–",
        (SCALE,),
        takes_weights=False,
        base="unused",
        most_models=1,
        mergekit=MergekitForm(("scale",), base="model"),
    ),
)
METHODS = {method.name: method for method in _ENTRIES}
DEFAULT_METHOD = _ENTRIES[0].name


def method_table_markdown() -> str:
    """The methods as the Markdown table of docs/method.md."""
    rows = ["| method | result | parameters (default) | from |", "|---|---|---|---|"]
    for method in METHODS.values():
        parameters = [
            f"`{item.name}`" + ("" if item.default is None else f" ({item.default:g})")
            for item in method.parameters
        ]
        parameters += ["`seed` (0)"] * method.takes_seed
        text = ", ".join(parameters) or "–"
        rows.append(f"| `{method.name}` | {method.result} | {text} | {method.source} |")
    return "\n".join(rows) + "\n"
