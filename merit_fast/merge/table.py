"""One declaration per merge method, for checks, help, the engine, mergekit's reader and docs.

To add a method, add its entry here and its rule in rules/; docs/method.md holds the printed table.
"""

from merit_fast.merge.method import MergekitForm, MergeMethod
from merit_fast.merge.parameters import (
    ACTIVE_EPSILON,
    DENSITY,
    EPS,
    EPSILON,
    GAMMA,
    MAX_ITER,
    NEAR_T,
    RAM_ALPHA,
    RAM_R,
    SCALE,
    SELECT_TOPK,
    TOL,
    T,
)
from merit_fast.merge.rules import deltas, elements, gram, sums, vectors
from merit_fast.merge.rules.kinds import ElementByElement, FromGram, ThinnedDeltas, WeightedSum

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
        passes=4,
        rescales=True,
        mergekit=MergekitForm(_SUM, normalize=True, rescale=False),
    ),
    MergeMethod(
        "dare_linear",
        ThinnedDeltas(deltas.dare_linear_rule),
        "θ0 + s Σ w_k (δ_k / p where u < p, else 0), p the `density`",
        _DARE,
        (DENSITY, SCALE),
        takes_seed=True,
        rescales=True,
        mergekit=MergekitForm(_SUM, rescale=True),
    ),
    MergeMethod(
        "dare_ties",
        ThinnedDeltas(deltas.dare_ties_rule),
        "`dare_linear` with elect in place of Σ",
        _DARE,
        (DENSITY, SCALE),
        takes_seed=True,
        rescales=True,
        mergekit=MergekitForm(_SUM, rescale=True),
    ),
    MergeMethod(
        "breadcrumbs",
        ThinnedDeltas(deltas.breadcrumbs_rule),
        "θ0 + s Σ w_k · (δ_k without its gamma·n largest, of the rest the density·n largest)",
        _BREADCRUMBS,
        (DENSITY, GAMMA, SCALE),
        passes=4,
        rescales=True,
        mergekit=MergekitForm(_SUM, rescale=False),
    ),
    MergeMethod(
        "breadcrumbs_ties",
        ThinnedDeltas(deltas.breadcrumbs_ties_rule),
        "`breadcrumbs` with elect in place of Σ",
        _BREADCRUMBS,
        (DENSITY, GAMMA, SCALE),
        passes=4,
        rescales=True,
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
        rescales=True,
        mergekit=MergekitForm(_SUM, normalize=True, rescale=True),
    ),
    MergeMethod(
        "della_linear",
        ThinnedDeltas(deltas.della_linear_rule, by_row=True),
        "`della` with Σ in place of elect",
        _DELLA,
        (DENSITY, EPSILON, SCALE),
        takes_seed=True,
        rescales=True,
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
        (EPS,),
        base="optional",
        passes=2,
        mergekit=MergekitForm(("normalize_weights",), normalize=True),
    ),
    MergeMethod(
        "model_stock",
        FromGram(gram.model_stock, vectors.model_stock_by_vector),
        "θ0 + c · mean δ_k, c = K cosine / (1 + (K − 1) cosine), cosine the mean over pairs of "
        "deltas; of whole tensors, rows or columns (`vectors`)",
        "Jang et al. 2024, arXiv 2403.19522",
        takes_weights=False,
        fewest_models=2,
        passes=2,
        mergekit=MergekitForm(("filter_wise",)),
    ),
    MergeMethod(
        "nuslerp",
        FromGram(vectors.nuslerp, vectors.nuslerp_by_vector),
        "sin((1 − t)ω)/sin ω x_1 + sin(tω)/sin ω x_2, t = w_2/(w_1 + w_2), a straight line where "
        "sin ω ≈ 0; x_k = θ_k, or δ_k with a base; of whole tensors, rows or columns (`vectors`)",
        "mergekit",
        base="optional",
        fewest_models=2,
        most_models=2,
        passes=2,
        mergekit=MergekitForm(("nuslerp_flatten", "nuslerp_row_wise")),
    ),
    MergeMethod(
        "karcher",
        FromGram(gram.karcher),
        r"mean \|θ_k\| · m, m the point of the sphere whose mean step to all θ_k/\|θ_k\| is "
        "shorter than `tol`",
        "arXiv 2603.04972",
        (MAX_ITER, TOL),
        takes_weights=False,
        base="unused",
        passes=2,
        mergekit=MergekitForm(base="model"),
    ),
    MergeMethod(
        "nearswap",
        ElementByElement(elements.nearswap_rule),
        r"θ0 + min(t/\|δ\|, 1) δ, by element",
        "alchemonaut, QuartetAnemoi-70B",
        (NEAR_T,),
        takes_weights=False,
        most_models=1,
    ),
    MergeMethod(
        "arcee_fusion",
        ElementByElement(elements.fusion_rule, by_row=True),
        r"θ_1 where i ≥ median + 1.5 (Q3 − Q1), else θ0; i = \|δ\| · KL(softmax θ_1 ‖ softmax θ0) "
        "of the row (last dimension), quantiles of the tensor's i, exact",
        "arcee.ai",
        takes_weights=False,
        most_models=1,
        passes=5,
    ),
    MergeMethod(
        "ram",
        ElementByElement(elements.ram_rule),
        r"θ0 + the δ_k of the only model with \|δ_k\| > `epsilon`, or the mean of several",
        "arXiv 2601.13572",
        (ACTIVE_EPSILON,),
        takes_weights=False,
    ),
    MergeMethod(
        "ramplus_tl",
        ElementByElement(elements.ramplus_rule),
        "`ram` with an only δ_k times 1 + r · min(shared_k/unique_k, alpha), numbers of its "
        "active elements in the tensor",
        "arXiv 2601.13572",
        (ACTIVE_EPSILON, RAM_R, RAM_ALPHA),
        takes_weights=False,
        passes=2,
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
