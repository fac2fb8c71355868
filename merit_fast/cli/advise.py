"""The work of ``merit-fast advise``: sketch, split, the advice, and the cost of a run."""

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merit_fast.manifests.schemas import SplitManifest
from merit_fast.manifests.stages import REPORT, SKETCH, SPLIT
from merit_fast.pipeline.arms import merit_steps
from merit_fast.progress import Progress
from merit_fast.report.advice import CONFIG, Advice, advise

if TYPE_CHECKING:
    from merit_fast.pipeline.config import RunConfig
    from merit_fast.pipeline.run import Run


def advise_command(config: "RunConfig", progress: Progress, file: str, as_json: bool) -> None:
    """Brings the split up to date, prints the advice on it and writes its report."""
    from merit_fast.model import keep_freed_memory
    from merit_fast.pipeline.run import Run, check_output

    check_output(config)
    keep_freed_memory()
    run = Run(config, progress, f"merit-fast {{stage}} {file}")
    run.preflight((SKETCH, SPLIT))
    advice, cost = advise_run(run, file)
    if as_json:
        print(json.dumps(_as_json(run, advice, cost)))
    else:
        print("\n".join(advice_lines(advice, cost)))
    run.report()


def advise_run(run: "Run", file: str) -> tuple[Advice, dict[str, Any]]:
    """Sketches and splits; returns the advice, with ``file`` in its commands, and a run's cost."""
    sketch_s = _sketch(run)
    run.split()
    split = run.outputs.split_manifest
    steps = merit_steps(run.config, split, run.outputs.contents)
    advice = advise(split, steps)
    advice = replace(advice, next=tuple(text.replace(CONFIG, file) for text in advice.next))
    return advice, _cost(split, steps, run.config.train.epochs, sketch_s)


def advice_lines(advice: Advice, cost: dict[str, Any]) -> list[str]:
    """The advice for a terminal."""
    steps = ", ".join(f"{count:,}" for count in cost["steps"])
    minutes = f"; about {cost['minutes']:,.0f} minutes here" if "minutes" in cost else ""
    return [
        advice.sentence,
        "",
        "Reasons:",
        *(f"- {reason}" for reason in advice.reasons),
        "",
        "Next:",
        *(f"- {text}" for text in advice.next),
        "",
        f"Training the branches takes {cost['rows']:,} rows, {cost['target_tokens']:,} target "
        f"tokens and {steps} optimizer steps{minutes}; each control takes as much again.",
    ]


def _sketch(run: "Run") -> float | None:
    """Sketches; returns the seconds, or None unless every example was sketched just now."""
    folder = run.outputs.folder(SKETCH)
    begun_before = folder.exists() or folder.with_name(f"{folder.name}.tmp").exists()
    fresh = not begun_before and not run.config.split.warmup
    begun = time.perf_counter()
    worked = run.sketch()
    return time.perf_counter() - begun if fresh and worked else None


def _cost(
    split: SplitManifest, steps: list[int], epochs: int, sketch_s: float | None
) -> dict[str, Any]:
    """Work of training all branches; minutes at the sketch's rate, if that was measured.

    A sketched example takes about as long as one in training: a forward and a backward pass.
    """
    rows = epochs * sum(row.num_examples for row in split.datasets)
    tokens = epochs * sum(row.num_target_tokens for row in split.datasets)
    cost: dict[str, Any] = {"rows": rows, "target_tokens": tokens, "steps": steps}
    if sketch_s is not None:
        sketched = sum(row.num_sketched_examples for row in split.datasets)
        cost["minutes"] = round(rows / sketched * sketch_s / 60, 1)
    return cost


def _as_json(run: "Run", advice: Advice, cost: dict[str, Any]) -> dict[str, Any]:
    return {
        "advice": advice.advice,
        "sentence": advice.sentence,
        "groups": advice.groups,
        "reasons": list(advice.reasons),
        "next": list(advice.next),
        "cost": cost,
        "split": str(run.outputs.file(SPLIT)),
        "report": str(run.outputs.file(REPORT)),
    }
