"""Compares every merge method with mergekit 0.1.5, run for real on tiny random models.

    python -m bench.merge.agreement DIR [--mergekit ENV_DIR]

mergekit computes in float32, merit_fast in float64; both write float32. Prints a Markdown table:
the largest difference, the share of elements with other bits, and the share that differs by more
than rounding (1e-6; the values are up to 1). Methods that draw random numbers are compared by the
share of one model's delta that they keep, and by the factor that enlarges it.
"""

import argparse
import json
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from bench.merge import mergekit_env
from bench.merge.checkpoints import INDEX_FILE, MODELS, SIZES, ensure_checkpoints, layout
from merit_fast.merge import MergeConfig, merge_models

BEYOND_ROUNDING = 1e-6
DRIVER = """
import sys, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(lazy_unpickle=True, quiet=True, random_seed=1)
for file in sorted(Path(sys.argv[1]).glob("*.yml")):
    text = file.read_text()
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(config, str(file.with_suffix("")), config_source=text, options=options)
"""
WEIGHTS = (0.5, 0.3, 0.2)


@dataclass(frozen=True)
class Case:
    """One method with its options here and there."""

    label: str
    method: str
    ours: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)  # mergekit's parameters, for all models
    models: int = 3
    weighted: bool = True
    base: bool = True
    kind: str = "fp32"  # of the inputs
    random: bool = False
    why: str = "rounding: float32 after every step there, float64 and once here"


UNNORMALISED = {"normalize": False}
SPREAD = {"density": 0.5, "epsilon": 0.2}
RESCALED = {"density": 0.5, "rescale": True}
FUSED = "float32 exponentials there: importances next to the threshold fall on either side"
CRUMBS = {"density": 0.6, "gamma": 0.1, "normalize": False}
TIES_THERE = "equal sizes at the threshold: any of them there, the first by index here"
CASES = [
    Case("linear", "linear", base=False),
    Case("task_arithmetic", "task_arithmetic", UNNORMALISED, UNNORMALISED),
    Case("ties", "ties", {"density": 0.5}, {"density": 0.5}),
    Case(
        "ties, bf16 inputs",
        "ties",
        {"density": 0.5},
        {"density": 0.5},
        kind="bf16",
        why=TIES_THERE,
    ),
    Case("ties, rescale", "ties", RESCALED, RESCALED),
    Case("breadcrumbs", "breadcrumbs", CRUMBS, CRUMBS),
    Case(
        "breadcrumbs, bf16 inputs",
        "breadcrumbs",
        CRUMBS,
        CRUMBS,
        kind="bf16",
        why=TIES_THERE,
    ),
    Case("breadcrumbs_ties", "breadcrumbs_ties", CRUMBS, CRUMBS),
    Case("sce", "sce", weighted=False),
    Case(
        "sce, select_topk 0.4",
        "sce",
        {"select_topk": 0.4},
        {"select_topk": 0.4},
        weighted=False,
    ),
    Case("slerp", "slerp", {"t": 0.3}, {"t": 0.3}, models=2, weighted=False),
    Case("multislerp", "multislerp", base=False),
    Case("multislerp with a base", "multislerp"),
    Case("model_stock", "model_stock", weighted=False),
    Case(
        "model_stock, rows",
        "model_stock",
        {"vectors": "row"},
        {"filter_wise": True},
        weighted=False,
    ),
    Case("nuslerp", "nuslerp", models=2, base=False),
    Case("nuslerp with a base", "nuslerp", models=2),
    Case("nuslerp, rows", "nuslerp", {"vectors": "row"}, {"nuslerp_flatten": False}, models=2),
    Case(
        "nuslerp, columns",
        "nuslerp",
        {"vectors": "column"},
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        models=2,
    ),
    Case("karcher", "karcher", weighted=False, base=False),
    Case("nearswap", "nearswap", {"t": 0.01}, {"t": 0.01}, models=1, weighted=False),
    Case("arcee_fusion", "arcee_fusion", models=1, weighted=False, why=FUSED),
    Case("ram", "ram", {"epsilon": 0.01}, {"epsilon": 0.01}, weighted=False),
    Case(
        "ramplus_tl",
        "ramplus_tl",
        {"epsilon": 0.01, "parameters": {"r": 0.3, "alpha": 0.5}},
        {"epsilon": 0.01, "r": 0.3, "alpha": 0.5},
        weighted=False,
    ),
    Case(
        "passthrough",
        "passthrough",
        {"scale": 0.5},
        {"scale": 0.5},
        models=1,
        weighted=False,
        base=False,
    ),
    Case(
        "dare_linear, density 1",
        "dare_linear",
        {"density": 1.0, **UNNORMALISED},
        {"density": 1.0},
    ),
    Case("dare_ties, density 1", "dare_ties", {"density": 1.0, **UNNORMALISED}, {"density": 1.0}),
    Case("della, density 1", "della", {"density": 1.0}, {"density": 1.0}),
    Case(
        "della_linear, density 1",
        "della_linear",
        {"density": 1.0, **UNNORMALISED},
        {"density": 1.0},
    ),
    Case("dare_linear", "dare_linear", {"density": 0.5}, {"density": 0.5}, models=1, random=True),
    Case("dare_ties", "dare_ties", {"density": 0.5}, {"density": 0.5}, models=1, random=True),
    Case("della", "della", SPREAD, SPREAD, models=1, random=True),
    Case("della_linear", "della_linear", SPREAD, SPREAD, models=1, random=True),
]


def write_models(root: Path) -> dict[str, list[Path]]:
    """Writes the base and its fine-tunes, by dtype. In fp32 all values differ."""
    narrow = ensure_checkpoints(root, "tiny")
    random = np.random.default_rng(1)
    wide = [root / "fp32" / name for name in MODELS]
    shutil.rmtree(root / "fp32", ignore_errors=True)
    tensors = {
        name: random.standard_normal(shape, np.float32) * 0.1
        for name, shape in layout(SIZES["tiny"]).items()
    }
    for number, (source, target) in enumerate(zip(narrow, wide, strict=True)):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", INDEX_FILE))
        steps = {
            name: random.standard_normal(t.shape, np.float32) * 0.02 for name, t in tensors.items()
        }
        moved = {
            name: (t + steps[name] if number else t).astype(np.float32)
            for name, t in tensors.items()
        }
        save_file(moved, target / "model.safetensors", {"format": "pt"})
    return {"fp32": wide, "bf16": narrow}


def recipe(case: Case, paths: list[Path]) -> str:
    """mergekit's configuration; slerp's first model is its base."""
    models: list[dict[str, Any]] = [{"model": str(path)} for path in paths[1 : case.models + 1]]
    for model, weight in zip(models, WEIGHTS if case.models > 1 else (1.0,), strict=False):
        if case.weighted:
            model["parameters"] = {"weight": weight}
    base = models[0]["model"] if case.method == "slerp" else str(paths[0])
    values = {
        "merge_method": case.method,
        "dtype": "float32",
        "models": models,
        "parameters": case.shared,
    }
    return json.dumps({**values, **({"base_model": base} if case.base else {})}, indent=1)


def run_ours(case: Case, paths: list[Path], out: Path) -> None:
    weights = WEIGHTS if case.models > 1 else (1.0,)
    options: dict[str, Any] = {"method": case.method, **case.ours}
    if case.weighted:
        options["weights"] = weights[: case.models]
    config = MergeConfig(dtype="fp32", fsync=False, **options)
    base = paths[0] if case.base and case.method != "slerp" else None
    merge_models(paths[1 : case.models + 1], base=base, out=out, config=config)


def read(model: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    return {name: tensor.astype(np.float64).ravel() for name, tensor in tensors.items()}


def compare(case: Case, mine: Path, theirs: Path, paths: list[Path]) -> str:
    ours = read(mine)
    other = read(theirs)
    if ours.keys() != other.keys():
        raise ValueError(f"{case.label}: other tensors: {sorted(ours.keys() ^ other.keys())}")
    if case.random:
        words = [_kept(model, paths) for model in (ours, other)]
        return f"| {case.label} | random | | | kept {words[0]} here, {words[1]} there |"
    difference = np.abs(np.concatenate([ours[name] - other[name] for name in ours]))
    changed = np.mean(difference != 0)
    beyond = np.mean(difference > BEYOND_ROUNDING)
    why = case.why if changed else "the same bits"
    return f"| {case.label} | {difference.max():.1e} | {changed:.2%} | {beyond:.3%} | {why} |"


def _kept(merged: dict[str, np.ndarray], paths: list[Path]) -> str:
    """The share of one model's delta that stays, and the factor that enlarges it."""
    base = read(paths[0])
    model = read(paths[1])
    step = np.concatenate([merged[name] - base[name] for name in merged])
    delta = np.concatenate([model[name] - base[name] for name in merged])
    stays = (step != 0) & (np.abs(delta) > 1e-3)
    return f"{np.mean(step != 0):.2%} (x {np.median(step[stays] / delta[stays]):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    arguments, python, words = mergekit_env.parse_with_mergekit(parser)
    root = arguments.directory.absolute()
    work = root / "agreement"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    models = write_models(root)
    for number, case in enumerate(CASES):
        (work / f"{number:02d}.yml").write_text(recipe(case, models[case.kind]))
    subprocess.run(
        [python, "-P", "-c", DRIVER, work], check=True, cwd=work, env={"HF_HUB_OFFLINE": "1"}
    )
    print(f"{words}; {sum(t.size for t in read(models['fp32'][0]).values()):,} elements\n")
    print("| method | largest difference | other bits | beyond rounding | why |")
    print("|---|---|---|---|---|")
    for number, case in enumerate(CASES):
        run_ours(case, models[case.kind], work / f"{number:02d}-ours")
        print(compare(case, work / f"{number:02d}-ours", work / f"{number:02d}", models[case.kind]))


if __name__ == "__main__":
    main()
