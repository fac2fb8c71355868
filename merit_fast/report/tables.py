"""Every table as formatted strings, from the manifests alone: the page and the terminal show the same ones.

A table is (columns, rows); the first column names the row, the others are right-aligned figures.
"""

from collections.abc import Callable, Mapping

from merit_fast.manifest import ArmResult, EvaluateManifest, SplitManifest

Table = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]

ABSENT = "–"  # not measured, or an arm that is not trained

_RESULT_COLUMNS: tuple[tuple[str, Callable[[ArmResult], str]], ...] = (
    ("loss", lambda result: f"{result.loss:z.3f}"),
    ("exact match %", lambda result: f"{100 * result.exact_match:.1f}"),
    ("text loss", lambda result: f"{result.text_loss:z.3f}"),
    ("chat NLL", lambda result: f"{result.chat_nll:z.3f}"),
    ("answer length", lambda result: f"{result.answer_length_tokens:.1f}"),
    ("displacement", lambda result: f"{result.displacement:.2f}"),
    ("trained tokens", lambda result: f"{result.num_tokens:,}" if result.num_tokens else ABSENT),
    ("train s", lambda result: f"{result.train_s:,.1f}" if result.train_s else ABSENT),
    ("peak GiB", lambda result: f"{result.peak_memory_bytes / 2**30:.2f}" if result.peak_memory_bytes else ABSENT),
)


def results_rows(evaluation: EvaluateManifest) -> Table:
    """One row per arm, in the manifest's order."""
    return _result_table("arm", evaluation.arms)


def branch_rows(evaluation: EvaluateManifest) -> Table:
    """The same columns, one row per branch."""
    return _result_table("branch", evaluation.branches)


def gain_rows(evaluation: EvaluateManifest) -> Table:
    """One row per merged arm: gain = mean branch loss - merged loss, nats per target token."""
    columns = ("merged arm", "merging gain", "mean branch loss", "merged loss")
    rows = tuple(
        (arm, f"{gain.gain:z.4f}", f"{gain.mean_branch_loss:z.4f}", f"{gain.merged_loss:z.4f}")
        for arm, gain in evaluation.merging_gain.items()
    )
    return columns, rows


def dataset_result_rows(split: SplitManifest, evaluation: EvaluateManifest) -> Table:
    """One row per dataset; per arm its loss and its exact match in percent. Datasets outside the split come last."""
    names = [row.name for row in split.datasets]
    evaluated = {name for arm in evaluation.arms.values() for name in arm.datasets}
    names += sorted(evaluated - set(names))
    columns = ["dataset"]
    for arm in evaluation.arms:
        columns += [f"{arm} loss", f"{arm} exact match %"]
    rows = []
    for name in names:
        row = [name]
        for result in evaluation.arms.values():
            one = result.datasets.get(name)
            row += [ABSENT, ABSENT] if one is None else [f"{one.loss:z.3f}", f"{100 * one.exact_match:.1f}"]
        rows.append(tuple(row))
    return tuple(columns), tuple(rows)


def split_rows(split: SplitManifest) -> Table:
    """One row per dataset of the split: groups, counts, gradient figures and scores."""
    axes = tuple(f"axis {axis + 1}" for axis in range(len(split.explained_variance)))
    counts = ("group", "random control", "examples", "target tokens", "examples sketched")
    columns = ("dataset", *counts, "loss at base", "gradient norm", "signal fraction", *axes)
    rows = tuple(
        (
            row.name,
            *(str(group) for group in (row.group, random)),
            *(f"{count:,}" for count in (row.num_examples, row.num_target_tokens, row.num_sketched_examples)),
            f"{row.mean_loss:z.3f}",
            f"{row.gradient_norm:.3g}",
            f"{row.signal_fraction:.3f}",
            *(f"{score:z.3f}" for score in scores),
        )
        for row, random, scores in zip(split.datasets, split.random_groups, split.scores, strict=True)
    )
    return columns, rows


def group_members(split: SplitManifest) -> Mapping[int, tuple[str, ...]]:
    """group -> its datasets in the manifest's order, every group 0..K-1 present."""
    return {group: tuple(row.name for row in split.datasets if row.group == group) for group in range(split.groups)}


def group_rows(split: SplitManifest) -> Table:
    """One row per group; the share is of the mixture's target tokens."""
    total = sum(row.num_target_tokens for row in split.datasets)
    rows = []
    for group, names in group_members(split).items():
        members = [row for row in split.datasets if row.group == group]
        tokens = sum(row.num_target_tokens for row in members)
        examples = sum(row.num_examples for row in members)
        share = percent(tokens / total) if total else ABSENT
        rows.append((f"group {group}", str(len(names)), f"{examples:,}", f"{tokens:,}", share))
    return ("group", "datasets", "examples", "target tokens", "share"), tuple(rows)


def percent(share: float) -> str:
    """0.1234 -> "12.3 %"; what is above 0 never shows as 0."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:z.1f} %"


def _result_table(first_column: str, results: Mapping[str, ArmResult]) -> Table:
    columns = (first_column, *(heading for heading, _ in _RESULT_COLUMNS))
    rows = tuple((name, *(show(result) for _, show in _RESULT_COLUMNS)) for name, result in results.items())
    return columns, rows
