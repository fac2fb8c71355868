"""Sketches of every causal language model of transformers, tiny, against a pass per example.

    python -m bench.sketch.architectures [TYPE ...] [--only-failures] [--layered]

Prints one line per type: fast (formulas, and backward passes per example through single modules),
slow (some parameters take a backward pass per example from the model's outputs), refused, wrong or
not built; the largest error of an example's sketch; seconds of one pass with all checks. Ends with
an error if a type is wrong or refused, or fewer are exact or fast than before.

With ``--layered`` it compares ``load_layered`` with the model in memory instead: equal (the bits of
the losses and of three sketches, and the same slow parameters), refused, wrong or not built.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import CountSketch, flat_sketch, matrix_shape
from merit_fast.model import load_model
from merit_fast.model.layered.load import load_layered
from merit_fast.patch.shrink import VOCABULARY, shrink_config
from merit_fast.sketch.capture.layout import RepeatBatch
from merit_fast.sketch.gradients import GradientSketcher
from merit_fast.sketch.names import named_parameters

SKETCH = CountSketch(4096, seed=7)
ROWS = 3
TOKENS = 16
MOST_ENTRIES = 200_000_000
# Of all types, with transformers 5.23; these may only rise.
EXACT_AT_LEAST = 172
FAST_AT_LEAST = 162
LIMIT = 2e-5  # of an example's error: the check's own


@dataclass(frozen=True)
class Outcome:
    kind: str  # fast, slow, refused, wrong or not built
    error: float = 0.0
    seconds: float = 0.0
    note: str = ""


def build(model_type: str) -> nn.Module:
    """A tiny model of a type, whose norms and biases are not at 1 and 0."""
    import transformers as t

    config = shrink_config(t.AutoConfig.for_model(model_type))
    return from_config(config)


def from_config(config: Any) -> nn.Module:
    import transformers as t

    auto: Any = t.AutoModelForCausalLM
    with torch.device("meta"):
        entries = sum(p.numel() for p in auto.from_config(config).parameters())
    if entries > MOST_ENTRIES:
        raise ValueError(f"{entries:,} parameters")
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    """[B] summed loss of each row."""
    logits = model(input_ids=ids, use_cache=False).logits.float()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return loss.view(len(ids), -1).sum(1)


def exact_sketch(model: nn.Module, ids: Tensor) -> Tensor:
    """[1, D] from an ordinary backward pass of one row."""
    model.zero_grad()
    losses_of(model, ids).sum().backward()  # type: ignore[no-untyped-call]
    out = torch.zeros(1, SKETCH.proj_dim)
    for name, parameter in named_parameters(model):
        if parameter.grad is not None:
            gradient = parameter.grad.reshape(1, *matrix_shape(parameter.shape))
            flat_sketch(gradient, name, SKETCH, out=out)
    model.zero_grad()
    return out


def measure(model: nn.Module, tokens: int = TOKENS, rows: int = ROWS) -> Outcome:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    try:
        exact = torch.cat([exact_sketch(model, ids[b : b + 1]) for b in range(rows)])
    except Exception as error:  # the model itself does not run
        return Outcome("not built", note=f"runs not: {one_line(error)}")
    start = time.perf_counter()
    slow: dict[str, str] = {}
    try:
        with GradientSketcher(
            model, SKETCH, uncovered="autograd", notify=warnings.warn
        ) as sketcher:
            losses_of(model, ids).sum().backward()  # type: ignore[no-untyped-call]
            sketches = sketcher.take()
            slow = sketcher.slow_parameters
    except MeritFastError as error:
        return Outcome("refused", note=one_line(error))
    except Exception as error:  # a crash is what this script looks for
        return Outcome("refused", note=f"CRASH {type(error).__name__}: {one_line(error)}")
    seconds = time.perf_counter() - start
    distance = (sketches - exact).norm(dim=1) / exact.norm(dim=1)
    worst = float(distance.max())
    total = len(list(model.parameters()))
    note = f"{len(slow)} of {total}: {' '.join(next(iter(slow.items())))}" if slow else ""
    if not worst <= LIMIT:
        return Outcome("wrong", worst, seconds, note)
    return Outcome("slow" if slow else "fast", worst, seconds, note)


def measure_layered(model: nn.Module) -> Outcome:
    """Compares a saved model layer by layer with the same in memory."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=generator)
    saved: Any = model
    with tempfile.TemporaryDirectory() as folder:
        try:
            saved.save_pretrained(folder)
            whole = sketches_of(load_model(folder, "fp32"), ids)
        except Exception as error:  # transformers cannot save it, load it or run it
            return Outcome("not built", note=one_line(error))
        start = time.perf_counter()
        try:
            layered = sketches_of(load_layered(folder, "fp32"), ids)
        except Exception as error:
            return Outcome("refused", note=f"{type(error).__name__}: {one_line(error)}")
        seconds = time.perf_counter() - start
    is_equal = all(torch.equal(a, b) for a, b in zip(whole[0], layered[0], strict=True))
    is_equal &= whole[1] == layered[1]
    return Outcome("equal" if is_equal else "wrong", seconds=seconds)


def sketches_of(model: nn.Module, ids: Tensor) -> tuple[list[Tensor], dict[str, str]]:
    """Losses and sketches of three passes, and the slow parameters."""
    values: list[Tensor] = []
    with GradientSketcher(
        model, SKETCH, uncovered="autograd", notify=warnings.warn, fingerprint="tiny"
    ) as sketcher:
        while len(values) < 6:
            losses = losses_of(model, ids)
            try:
                losses.sum().backward()  # type: ignore[no-untyped-call]
                values += [sketcher.take(), losses.detach()]
            except RepeatBatch:
                sketcher.discard()
    return values, sketcher.slow_parameters


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def measure_type(model_type: str, layered: bool = False) -> Outcome:
    try:
        model = build(model_type)
    except Exception as error:  # no tiny model of this type
        return Outcome("not built", note=one_line(error))
    return measure_layered(model) if layered else measure(model)


def causal_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all if none is given")
    parser.add_argument("--only-failures", action="store_true")
    parser.add_argument("--layered", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts = Counter[str]()
    print("| type | sketch | error | seconds | note |\n|---|---|---|---|---|", flush=True)
    for model_type in arguments.types or causal_types():
        outcome = measure_type(model_type, arguments.layered)
        counts[outcome.kind] += 1
        if not (arguments.only_failures and outcome.kind in ("fast", "slow", "equal")):
            print(
                f"| {model_type} | {outcome.kind} | {outcome.error:.0e} | {outcome.seconds:.2f} | "
                f"{outcome.note[:160]} |",
                flush=True,
            )
    print("\n" + ", ".join(f"{number} {kind}" for kind, number in counts.most_common()))
    if arguments.layered:
        sys.exit("some types are wrong" if counts["wrong"] else None)
    if counts["wrong"] or counts["refused"]:
        sys.exit("some types are wrong or refused")
    exact = counts["fast"] + counts["slow"]
    if not arguments.types and (counts["fast"] < FAST_AT_LEAST or exact < EXACT_AT_LEAST):
        sys.exit(f"must be at least {EXACT_AT_LEAST} exact and {FAST_AT_LEAST} fast")


if __name__ == "__main__":
    main()
