"""The command `merge`, of checkpoints, a run's branches, or a mergekit recipe. Imports no torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.cli.merge.folder_lines import folder_lines
from merit_fast.errors import InputError
from merit_fast.manifests.io import manifest_text
from merit_fast.merge import MergeConfig, RunFacts, merge_models
from merit_fast.merge.combine.weights import require_numbers
from merit_fast.merge.option_names import options_named
from merit_fast.merge.read.remote import Location, as_location
from merit_fast.merge.table import DEFAULT_METHOD, METHODS
from merit_fast.merge.write.places import check_paths
from merit_fast.options.parser import override, parse, to_plain
from merit_fast.progress import Progress
from merit_fast.records import fields
from merit_fast.units import human_bytes, human_count

if TYPE_CHECKING:
    from merit_fast.cli.merge.in_force import RunSource
    from merit_fast.manifests.schemas import TuneManifest

Tune = Callable[
    [Sequence[tuple[Location, float | None]], Location | None, MergeConfig], "TuneManifest"
]


@options_named("command line")
def merge_command(  # noqa: PLR0913
    out: str,
    models: list[str] | None,
    base: str | None,
    run: "RunSource | None",
    mergekit: str | None,
    assignments: list[str],
    progress: Progress,
    *,
    dry_run: bool = False,
    share: str | None = None,
    tune: Tune | None = None,
) -> dict[str, Any]:
    """Merges the models that ``models``, ``run`` or ``mergekit`` name into the directory ``out``.

    Args:
        models: DIR or DIR:WEIGHT each.
        run: the branches in force of an output of `merit-fast run`, by their token counts.
        mergekit: a YAML recipe of mergekit.
        assignments: ``key=value`` of MergeConfig.
        dry_run: check and plan only.
        share: "i/n", this process's part of the output files.
        tune: chooses the scale or weights on held-out rows; None: there are none.

    Returns:
        the summary of ``merge_models``, with "tuned" if rows chose a number.

    Raises:
        InputError: not exactly one of the three, or options that exclude each other; see
            ``merge_models``.
    """
    if sum(source is not None for source in (models or None, run, mergekit)) != 1:
        raise InputError("command line: merge: give one of --model, --run and --mergekit")
    number_and_count = share_of(share)
    if mergekit is not None:
        from merit_fast.integrations.mergekit.run import merge_mergekit

        if tune:
            raise InputError("command line: merge: --validation goes with --model or --run")
        if base:
            raise InputError("command line: merge: --base is named in the recipe of --mergekit")
        file = Path(mergekit)
        return merge_mergekit(
            file, out, progress, assignments, dry_run=dry_run, share=number_and_count
        )
    config = parse(MergeConfig, override({}, assignments), "command line")
    facts = None
    if run:
        branches, facts = run.branches(progress)
        pairs: list[tuple[Location, float | None]] = [(path, None) for path in branches]
    else:
        pairs = [_split_weight(model) for model in models or ()]
    paths = [path for path, _ in pairs]
    weights = _weights(pairs)
    if tune is None:
        require_numbers(config)
        return merge_models(
            paths,
            weights,
            base,
            out=out,
            config=config,
            progress=progress,
            dry_run=dry_run,
            share=number_and_count,
            run=facts,
        )
    if not config.is_tuned:
        raise InputError(
            "command line: merge: --validation goes with --scale auto or --weights fit"
        )
    if dry_run or share:
        raise InputError(
            "command line: merge: --dry-run and --share go with a scale and weights in numbers"
        )
    return _merge_tuned(tune, pairs, weights, base, out, config, progress, facts)


def _merge_tuned(
    tune: Tune,
    pairs: Sequence[tuple[Location, float | None]],
    weights: list[float] | None,
    base: str | None,
    out: str,
    config: MergeConfig,
    progress: Progress,
    run: RunFacts | None,
) -> dict[str, Any]:
    """Chooses the open numbers on held-out rows, then merges with them."""
    paths = [path for path, _ in pairs]
    check_paths(paths, as_location(out))
    chosen = tune(pairs, as_location(base) if base else None, config)
    if config.weights == "fit":  # it was pulled towards the models' weights
        weights = None
    config = config.filled(chosen.weights, chosen.scale)
    from merit_fast.manifests.schemas import TUNE_FILE

    records = {TUNE_FILE: manifest_text(chosen)}
    summary = merge_models(
        paths, weights, base, out=out, config=config, progress=progress, records=records, run=run
    )
    return summary | {"tuned": to_plain(chosen)}


def require_merge_inputs(inputs: Sequence[str]) -> None:
    """Checks that a merge without --model, --run and --mergekit names a run's CONFIG.yml.

    Raises:
        InputError: nothing is named, or no file: says what is missing.
    """
    sources = "--model A --model B, --run RUN or --mergekit RECIPE.yml"
    names = [text for text in inputs if "=" not in text]
    if not names:
        raise InputError(
            f"command line: merge: needs OUT and {sources}, or the CONFIG.yml of a run"
        )
    name = names[0]
    if not Path(name).is_file() and not name.endswith((".yml", ".yaml")):
        state = "is a directory and no CONFIG.yml" if Path(name).is_dir() else "is no CONFIG.yml"
        raise InputError(f"command line: merge: {name} {state}; to merge into it, add {sources}")


def param_assignments(params: Sequence[str], method: str | None) -> list[str]:
    """``--param KEY=VALUE`` as assignments to MergeConfig.

    A key that is no option of every merge, and that the method takes, is one of its own parameters;
    with a registered method every such key.

    Raises:
        InputError: not of the form KEY=VALUE.
    """
    options = {field.name for field in fields(MergeConfig)}
    pairs = [text.partition("=") for text in params]
    for text, (_, equals, _) in zip(params, pairs, strict=True):
        if not equals:
            raise InputError(f"command line: --param: must be KEY=VALUE, got {text!r}")
    named = method or next((value for key, _, value in pairs if key == "method"), DEFAULT_METHOD)
    built_in = METHODS.get(named)
    return [
        text
        if key.partition(".")[0] in options or (built_in and not built_in.takes(key))
        else f"parameters.{text}"
        for text, (key, _, _) in zip(params, pairs, strict=True)
    ]


def describe(summary: dict[str, Any], dry_run: bool) -> str:
    """The summary for people: a line for each model, for the choices made, and for the sizes."""
    state = "planned" if dry_run else "done"
    if summary.get("adapter"):
        from merit_fast.cli.merge.joined import describe_adapter

        return describe_adapter(summary, state)
    if not summary["finished"]:
        state = "this share is done, others are missing"
    count = len(summary["models"])
    lines = [
        f"{summary['merged']}: {state}: {summary['method']} of {count} model{'s' * (count != 1)}"
    ]
    has_weights = any(weight is not None for _, weight in summary["models"])
    coefficients = _aligned(summary)
    for number, (path, weight) in enumerate(summary["models"]):
        shown = "by tensor" if weight is None else f"{weight:.6f}"
        line = f"  weight {shown:<9}  {path}" if has_weights else f"  model {path}"
        lines.append(line + _coefficient(coefficients[number], weight))
    if base := summary["base"]:
        line = f"  base {' ' * 13 * has_weights}{base}"
        lines.append(line + _coefficient(coefficients[count], None))
    if trajectory := summary.get("trajectory"):
        steps = ", ".join(str(step) for step, _, _ in trajectory)
        lines.append(f"  trajectory: steps {steps}; schedule {summary['schedule']}")
    lines.append(f"  weights: {summary['weights_reason']}")
    lines.append(f"  dtype: {summary['dtype']}, {summary['dtype_reason']}")
    if summary["vocabulary"]:
        lines.append(f"  vocabulary: {summary['vocabulary']}")
    lines += [f"  note: {note}" for note in summary["notes"]]
    lines += folder_lines(summary)
    sizes = {name: human_bytes(summary[f"{name}_bytes"]) for name in ("buffer", "free")}
    files = summary["shards"]
    lines.append(
        f"  {human_count(summary['parameters'])} parameters in {summary['tensors']} tensors and "
        f"{files} file{'s' * (files != 1)}: {human_bytes(summary['bytes_in'])} read, "
        f"{human_bytes(summary['bytes_out'])} written, {sizes['buffer']} of buffers, "
        f"{sizes['free']} free on disk"
    )
    return "\n".join(lines)


def _aligned(summary: dict[str, Any]) -> list[float | None]:
    """[K + 1] coefficients of the models and the base; all None where layers are stacked."""
    models = [path for path, _ in summary["models"]]
    paths = [path for path, _ in summary["coefficients"]]
    coefficients = [coefficient for _, coefficient in summary["coefficients"]]
    if paths[: len(models)] != models:
        return [None] * (len(models) + 1)
    return [*coefficients, None][: len(models) + 1]


def _coefficient(coefficient: float | None, weight: float | None) -> str:
    """The factor of a model in the sum, where it is another number than the model's weight."""
    if coefficient is None or (weight is not None and abs(coefficient - weight) < 1e-9):
        return ""
    return f" (coefficient {coefficient:+.6f})"


def _split_weight(text: str) -> tuple[Location, float | None]:
    path, colon, weight = text.rpartition(":")
    if not colon or weight.startswith("//") or Path(text).exists():
        return as_location(text), None
    try:
        return as_location(path), float(weight)
    except ValueError:
        raise InputError(
            f"command line: --model: must be DIR or DIR:WEIGHT, got {text!r}"
        ) from None


def _weights(pairs: Sequence[tuple[Location, float | None]]) -> list[float] | None:
    weights = [weight for _, weight in pairs if weight is not None]
    if weights and len(weights) < len(pairs):
        raise InputError(
            f"merge: give a weight to every model or to none, "
            f"got {len(weights)} for {len(pairs)} models"
        )
    return weights or None


def share_of(text: str | None) -> tuple[int, int]:
    """``--share I/N`` as two numbers."""
    if text is None:
        return 1, 1
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(f"command line: --share: must be I/N with 1 <= I <= N, got {text!r}")
    return int(number), int(count)
