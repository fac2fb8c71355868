"""README.md of a merged model: a model card from facts known when it is merged, the same bytes
for any number of threads or processes.
"""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.manifests.io import read_manifest, tool_versions
from merit_fast.manifests.schemas.tune import TUNE_FILE
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.quantise.rounding import read_rounding
from merit_fast.merge.read.remote import Location, as_location
from merit_fast.merge.read.slices import Slice
from merit_fast.merge.tokenizer_options import TokenizerOptions, with_names
from merit_fast.merge.write.card_options import changed_flags, shown_parameters, value_text
from merit_fast.options.parser import NO_TEXTS
from merit_fast.records import record, replace

if TYPE_CHECKING:
    from merit_fast.manifests.schemas import BranchManifest, SplitManifest
    from merit_fast.merge.engine.modules import Module

CARD_FILE = "README.md"
_TAGS = ["merge", "merit"]
_LIBRARY = "transformers"
_BARE = re.compile(r"[A-Za-z][\w./-]*", re.ASCII)


@record
class RunFacts:
    """The run whose branches are merged. ``base``: its ``model`` key. ``arm``: the merged arm.

    ``absent``: branches of the arm that the merge does without.
    """

    base: str
    split: "SplitManifest"
    arm: str
    is_stage: bool  # whether the run merges them itself; config.yml then lies next to the card
    absent: tuple[str, ...] = ()


@record
class CardFacts:
    """The merge that a card describes.

    ``weights`` has None where the method takes no weights, or weighs each tensor by itself.
    """

    models: Sequence[Location]
    weights: Sequence[float | None]
    base: Location | None
    config: MergeConfig
    dtype: str  # one clause
    slices: tuple[Slice, ...]
    run: RunFacts | None
    modules: "tuple[Module, ...]" = ()  # towers that were merged, each by models of its own


def model_card(facts: CardFacts, directory: Path) -> str:
    """The card's text. ``directory`` holds the finished output's other files."""
    branches = [_branch(model) for model in facts.models]
    facts = _without_folders(facts)
    parts = [
        _front_matter(facts),
        "# Merged model\n",
        _opening(facts),
        "## Models\n\n" + _model_table(facts, branches),
        "## Method\n\n" + _method_text(facts, directory),
    ]
    if facts.slices:
        parts.append("## Slices\n\n" + _slices_text(facts))
    if facts.modules:
        parts.append("## Towers\n\n" + _towers_text(facts))
    if facts.run:
        parts.append("## Split\n\n" + _split_text(facts.run))
    parts.append("## Reproduce\n\n" + _command_text(facts))
    return "\n".join(parts)


def _without_folders(facts: CardFacts) -> CardFacts:
    """The facts with short names of models in the tokenizer's options."""
    options = facts.config.tokenizer_options
    if options is None:
        return facts
    paths = [*facts.models, *([facts.base] if facts.base else [])]
    names = dict(zip(map(str, paths), labels_of(paths), strict=True))

    def name_of(text: str) -> str:
        return names.get(text) or labels_of([as_location(text)])[0]

    short: str | TokenizerOptions = with_names(options, name_of)
    if isinstance(facts.config.tokenizer, str):
        short = with_names(options, name_of).source
    return replace(facts, config=replace(facts.config, tokenizer=short))


def labels_of(paths: Sequence[Location]) -> list[str]:
    """Short names of models: a hub id, or a folder's name, with its parent's if not unique.

    A card never shows the folders or buckets of those who made it.
    """
    names = [_label(path, 1) for path in paths]
    places = zip(paths, names, strict=True)
    return [_label(path, 2) if names.count(name) > 1 else name for path, name in places]


def _label(path: Location, depth: int) -> str:
    parts = path.resolve().parts if isinstance(path, Path) else tuple(path.path.split("/"))
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/")
    return "/".join(parts[-depth:])


def _front_matter(facts: CardFacts) -> str:
    base = [_base_label(facts)] if facts.base or facts.run else labels_of(facts.models)
    lines = ["base_model:", *(f"- {_yaml_text(name)}" for name in base)]
    lines += [f"library_name: {_LIBRARY}", "tags:", *(f"- {tag}" for tag in _TAGS)]
    return "\n".join(["---", *lines, "---", ""])


def _yaml_text(text: str) -> str:
    """A text as YAML has it: bare where it can only be a text, else quoted as in JSON."""
    if _BARE.fullmatch(text) and text.lower() not in NO_TEXTS:
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _base_label(facts: CardFacts) -> str:
    if facts.run:
        base = facts.run.base
        named = Path(base).expanduser()
        is_path = named.is_dir() or base.startswith(("/", ".", "~")) or base.count("/") > 1
        return labels_of([named])[0] if is_path else base
    return labels_of([facts.base])[0] if facts.base else ""


def _opening(facts: CardFacts) -> str:
    count = len(facts.models)
    models = f"{count} model{'s' * (count != 1)}"
    version = tool_versions()["merit_fast"]
    base = _base_label(facts)
    start = f" The models started from `{base}`." if base else ""
    return (
        f"A merge of {models} by the method `{facts.config.method}`, made with merit_fast "
        f"{version}.{start}\n"
    )


def _branch(model: Location) -> "BranchManifest | None":
    file = model / "branch.json"
    if not file.is_file():
        return None
    from merit_fast.manifests.schemas import BranchManifest

    return read_manifest(BranchManifest, file)


def _model_table(facts: CardFacts, branches: "Sequence[BranchManifest | None]") -> str:
    header = ["model", "weight"]
    if any(branches):
        header += ["datasets", "examples", "target tokens", "steps"]
    rows = []
    names = labels_of(facts.models)
    for name, weight, branch in zip(names, facts.weights, branches, strict=True):
        row = [f"`{name}`", "" if weight is None else f"{weight:.6g}"]
        if branch:
            row += [", ".join(branch.datasets), f"{branch.num_examples:,}"]
            row += [f"{branch.num_target_tokens:,}", f"{branch.steps:,}"]
        rows.append(row + [""] * (len(header) - len(row)))
    return _table(header, rows)


def _method_text(facts: CardFacts, directory: Path) -> str:
    config = facts.config
    method = config.method_entry
    formula = f": {method.result} ({method.source})" if method.result else ""
    lines = [f"`{method.name}`{formula}\n"]
    values = {} if facts.modules else shown_parameters(config)
    lines += [f"- `{name}`: {value_text(value)}" for name, value in values.items()]
    lines.append(f"- dtype: {facts.dtype}; sums are taken in float64 and rounded once")
    if rounding := read_rounding(directory):
        errors = rounding["rounding"]
        lines.append(
            f"- rounding to codes: largest error {errors['largest_error']:.3g}, root mean square "
            f"{errors['rms_error']:.3g}, which is {errors['relative_rms_error']:.2%} of the values'"
        )
    if (directory / TUNE_FILE).exists():
        lines.append(f"- held-out rows chose weights or scale: `{TUNE_FILE}` has every loss")
    return "\n".join(lines) + "\n"


def _slices_text(facts: CardFacts) -> str:
    paths = list(dict.fromkeys([*facts.models, *([facts.base] if facts.base else [])]))
    names = dict(zip(paths, labels_of(paths), strict=True))
    rows = []
    for each in facts.slices:
        sources = [*each.sources, *([each.base] if each.base else [])]
        rows.append(" + ".join(f"`{names[s.path]}` [{s.first}:{s.end}]" for s in sources))
    return "".join(f"- {row}\n" for row in rows)


def _towers_text(facts: CardFacts) -> str:
    names = dict(zip(facts.models, labels_of(facts.models), strict=True))
    rows = []
    for module in facts.modules:
        models = ", ".join(f"`{names.get(path, path.name)}`" for path in module.models)
        values = shown_parameters(module.config)
        numbers = [f"`{name}`: {value_text(value)}" for name, value in values.items()]
        rows.append(f"- `{module.name}`: {models}; {'; '.join(numbers)}\n")
    return "".join(rows) + "- every other tower: as in the model that gives config.json\n"


def _split_text(run: RunFacts) -> str:
    split = run.split
    lines = [f"{len(split.datasets)} datasets in {split.groups} groups, arm `{run.arm}`"]
    is_merit = run.arm == "merit"
    known = (*split.control_arms, "merit")
    if is_merit:
        lines[0] += f", by the method `{split.method}`; gradients taken {split.sketched_at}"
    separation = split.separation
    if is_merit and separation and separation.cross_validated is not None:
        null = separation.null_mean
        chance = "" if null is None else f", of random splits {null:.3f}"
        lines[0] += f"; cross-validated η² {separation.cross_validated:.3f}{chance}"
    lines[0] += ".\n"
    if run.absent:
        names = ", ".join(f"`{name}`" for name in run.absent)
        lines.append(f"**Without {names}**: not finished when the others were merged.\n")
    if run.arm in known:
        groups = split.group_of(run.arm)
        rows = [
            [
                row.name,
                "all" if groups[row.name] < 0 else str(groups[row.name]),
                f"{row.num_examples:,}",
                f"{row.num_target_tokens:,}",
            ]
            for row in sorted(split.datasets, key=lambda row: (groups[row.name], row.name))
        ]
        lines.append(_table(["dataset", "group", "examples", "target tokens"], rows).rstrip("\n"))
    return "\n".join(lines) + "\n"


def _command_text(facts: CardFacts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in tool_versions().items())
    where = "`config.yml` lies next to this file" if facts.run and facts.run.is_stage else ""
    lines = [f"```sh\n{_command(facts)}\n```\n", *([where + ".\n"] if where else [])]
    return "\n".join([*lines, f"Versions: {versions}.\n"])


def _command(facts: CardFacts) -> str:
    if facts.run and facts.run.is_stage:
        return "merit-fast run config.yml"
    if facts.slices or facts.modules:
        return "merit-fast merge OUT --mergekit RECIPE.yml"
    config = facts.config
    words = ["merit-fast", "merge", "OUT"]
    given = config.weights if isinstance(config.weights, tuple) else ()
    for i, name in enumerate(labels_of(facts.models)):
        words += ["--model", f"{name}:{given[i]!r}" if given else name]
    if facts.base:
        words += ["--base", labels_of([facts.base])[0]]
    if isinstance(config.weights, str):
        words += ["--weights", config.weights]
    return " ".join([*map(shlex.quote, words), *changed_flags(config)])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )
