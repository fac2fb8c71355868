"""``patch_model`` on every causal language model of transformers, tiny, against the model itself.

    python -m bench.train.architectures [TYPE ...]

Prints one line per type: what is replaced; the largest error of losses, logits and gradients over
plain, left-padded, packed rows and ``num_items_in_batch``, in units of what is allowed; seconds of
``patch_model``. The table after them is that of docs/kernels.md. Ends with an error if a type
differs or does not get its bits back, or fewer have the head or layers than before.
"""

import argparse
import copy
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.sketch.architectures import build, causal_types, one_line
from merit_fast.patch.model import Patch, patch_model

VOCABULARY = 97
ROWS = 2
TOKENS = 12
# Of all types, with transformers 5.23; these may only rise.
HEAD_AT_LEAST = 90
LAYERS_AT_LEAST = 85
LOSS = 1e-5
GRADIENT = 2e-5
LAYERS = ("rms_norm", "swiglu", "geglu", "rope")
WORDS = {
    "rms_norm": "norms",
    "add_rms_norm": "norms",
    "swiglu": "gated MLPs",
    "geglu": "gated MLPs",
    "rope": "rotary positions",
    "head": "head",
}


@dataclass(frozen=True)
class Outcome:
    kind: str  # exact, wrong, or not built
    replaced: tuple[tuple[str, int], ...] = ()
    error: float = 0.0
    seconds: float = 0.0
    note: str = ""

    @property
    def has_head(self) -> bool:
        return self.kind == "exact" and any(op == "head" for op, _ in self.replaced)

    @property
    def has_layers(self) -> bool:
        return self.kind == "exact" and any(op in LAYERS for op, _ in self.replaced)


@dataclass(frozen=True)
class Result:
    loss: Tensor
    logits: Tensor | None
    gradients: dict[str, Tensor]


def batches() -> Iterator[tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    plain = {"input_ids": ids, "labels": labels}
    yield "plain", plain
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    yield (
        "left-padded",
        {**plain, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)},
    )
    yield "num_items_in_batch", {**plain, "num_items_in_batch": torch.tensor(7)}
    places = torch.cat([torch.arange(5), torch.arange(TOKENS - 5)])[None]
    yield (
        "packed",
        {"input_ids": ids[:1], "labels": labels[:1], "position_ids": places},
    )


def run(model: nn.Module, batch: dict[str, Any], training: bool) -> Result:
    """Loss, logits and gradients of a copy: some models change buffers when they run."""
    twin: Any = copy.deepcopy(model).train(training)
    torch.manual_seed(5)
    output = twin(**batch, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    logits = output.logits
    return Result(output.loss.detach(), None if logits is None else logits.detach(), gradients)


def error_of(actual: Result, expected: Result) -> float:
    """The largest error, in units of what is allowed."""
    if actual.gradients.keys() != expected.gradients.keys():
        return float("inf")
    errors = [float((actual.loss - expected.loss).abs() / expected.loss.abs()) / LOSS]
    total = sum(float(g.double().square().sum()) for g in expected.gradients.values()) ** 0.5
    for name, gradient in expected.gradients.items():
        norm = float(gradient.double().norm()) + 0.01 * total
        difference = float((actual.gradients[name].double() - gradient.double()).norm())
        errors.append(difference / norm / GRADIENT)
    if actual.logits is not None and expected.logits is not None:
        distance = (actual.logits - expected.logits).norm() / expected.logits.norm()
        errors.append(float(distance) / LOSS)
    return max(errors)


def run_all(model: nn.Module) -> dict[tuple[str, bool], Result]:
    """Results of every batch that the model takes, in training and in evaluation."""
    results = {}
    for name, batch in batches():
        for training in (True, False):
            try:
                results[name, training] = run(model, batch, training)
            except Exception:  # this model takes no such batch
                if name == "plain":
                    raise
    return results


def error_of_all(
    model: nn.Module, plain: nn.Module, expected: dict[tuple[str, bool], Result]
) -> tuple[float, str]:
    """The largest error of a patched model, and where it is."""
    worst = 0.0, ""
    for name, batch in batches():
        for training in (True, False):
            if (name, training) not in expected:
                continue
            actual = run(model, batch, training)
            error = error_of(actual, expected[name, training])
            if error > 1:  # rounding: we may be 3 times as far from float64 as the model
                truth = run(copy.deepcopy(plain).double(), batch, training)
                own_error = error_of(expected[name, training], truth)
                error = min(error, error_of(actual, truth) / (3 * own_error))
            worst = max(worst, (error, f"{name}, {'training' if training else 'evaluation'}"))
    return worst


def measure(model: nn.Module) -> Outcome:
    plain = copy.deepcopy(model)
    try:
        expected = run_all(model)
    except Exception as error:  # the model itself does not run
        return Outcome("not built", note=one_line(error))
    start = time.perf_counter()
    patch: Patch = patch_model(model)
    seconds = time.perf_counter() - start
    replaced = tuple(patch.replaced.items())
    worst, place = error_of_all(model, plain, expected)
    if not worst <= 1:
        return Outcome("wrong", replaced, worst, seconds, place)
    patch.restore()
    again = run(model, next(batches())[1], True)
    before = expected["plain", True]
    same = [torch.equal(again.gradients[name], g) for name, g in before.gradients.items()]
    if not torch.equal(again.loss, before.loss) or not all(same):
        return Outcome("wrong", replaced, worst, seconds, "does not get its bits back")
    return Outcome("exact", replaced, worst, seconds, "; ".join(patch.notes))


def measure_type(model_type: str) -> Outcome:
    try:
        model = build(model_type)
    except Exception as error:  # no tiny model of this type
        return Outcome("not built", note=one_line(error))
    return measure(model)


def ops_in_words(outcome: Outcome) -> str:
    """The replaced parts of a type, in the words of docs/kernels.md."""
    words = list(dict.fromkeys(WORDS[op] for op, _ in outcome.replaced))
    return ", ".join(words) or "nothing"


def table_of(outcomes: dict[str, Outcome]) -> str:
    """The table of docs/kernels.md: types by what is replaced, most types first."""
    groups: dict[str, list[str]] = {}
    for model_type, outcome in sorted(outcomes.items()):
        if outcome.kind == "exact":
            groups.setdefault(ops_in_words(outcome), []).append(model_type)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    rows = [f"| {words} | {len(types)} | {', '.join(types)} |" for words, types in ordered]
    return "\n".join(["| replaced | types | model types |", "|---|---|---|", *rows])


def read_table(text: str) -> dict[str, str]:
    """Model type -> what is replaced, from a page with ``table_of``."""
    start = text.index("| replaced | types | model types |")
    lines = text[start:].splitlines()[2:]
    found = {}
    for line in lines:
        if not line.startswith("|"):
            break
        words, _, types = (cell.strip() for cell in line.strip("|").split("|"))
        found.update(dict.fromkeys(types.split(", "), words))
    return found


def line_of(model_type: str, outcome: Outcome) -> str:
    replaced = ", ".join(f"{op} × {count}" for op, count in outcome.replaced) or "nothing"
    return (
        f"| {model_type} | {outcome.kind} | {replaced} | {outcome.error:.2f} | "
        f"{outcome.seconds:.2f} | {outcome.note[:160]} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all if none is given")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    outcomes = {}
    print("| type | result | replaced | error / allowed | seconds | unchanged |")
    print("|---|---|---|---|---|---|", flush=True)
    for model_type in arguments.types or causal_types():
        outcomes[model_type] = measure_type(model_type)
        print(line_of(model_type, outcomes[model_type]), flush=True)
    counts = Counter(outcome.kind for outcome in outcomes.values())
    heads = sum(outcome.has_head for outcome in outcomes.values())
    layers = sum(outcome.has_layers for outcome in outcomes.values())
    print("\n" + table_of(outcomes))
    print("\n" + ", ".join(f"{number} {kind}" for kind, number in counts.most_common()))
    print(f"{heads} with head, {layers} with layers")
    if counts["wrong"]:
        sys.exit("some types are wrong")
    if not arguments.types and (heads < HEAD_AT_LEAST or layers < LAYERS_AT_LEAST):
        sys.exit(f"must be at least {HEAD_AT_LEAST} with head and {LAYERS_AT_LEAST} with layers")


if __name__ == "__main__":
    main()
