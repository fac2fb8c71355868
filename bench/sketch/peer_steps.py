"""One peer's steps, timed in turn with the plain step in one process of the peers' environment.

    python -m bench.sketch.peer_steps PEER [--rounds 3] [--threads 1] [--tokens 128] [--quick]

merit-fast runs in its own environment, the others without it. Each step's result is a gradient
quantity of every example and is compared with exact gradients first. The last line printed is JSON:
of round 0 and step "plain", "0/plain/wall_s" and "0/plain/cpu_s".
"""

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.sketch.work import (
    PROJ_DIM,
    Work,
    exact_gradients,
    frozen,
    mean_losses,
    plain,
    relative_error,
    rotated,
    sketched,
    small_model,
    timed,
    token_work,
)

BATCH = 8
BOUND = 2e-4
# bergson's projection to 64 x 64 a layer; of the dense ones, in blocks of 8
SIDE = 64
DIMENSIONS = 16
BLOCK = 8
Run = Callable[[], Any]
Check = Callable[[Any], None]
Steps = dict[str, Callable[[Work], contextlib.AbstractContextManager[tuple[Run, Check]]]]


def tables(model: nn.Module) -> tuple[Tensor, Tensor]:
    """A CountSketch's buckets and signs, 12 bytes for each parameter, drawn outside of the time."""
    count = sum(parameter.numel() for parameter in model.parameters())
    generator = torch.Generator().manual_seed(0)
    buckets = torch.randint(0, PROJ_DIM, (count,), generator=generator)
    return buckets, torch.randint(0, 2, (count,), generator=generator).mul_(2).sub_(1).float()


def scatter(rows: Tensor, buckets: Tensor, signs: Tensor) -> Tensor:
    return torch.stack([torch.zeros(PROJ_DIM).index_add_(0, buckets, row * signs) for row in rows])


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def expect(actual: Tensor, truth: Tensor, what: str) -> None:
    error = relative_error(actual.flatten(), truth.flatten())
    if not error < BOUND:
        raise SystemExit(f"{what}: is off by {error:.1e}")


def backward(work: Work) -> None:
    work.losses().sum().backward()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def merit_fast(work: Work) -> Iterator[tuple[Run, Check]]:
    def check(sketches: Tensor) -> None:
        from merit_fast.kernels.sketch import CountSketch, flat_sketch, matrix_shape

        truth = torch.zeros(1, PROJ_DIM)
        for name, gradient in exact_gradients(work, 3).items():
            flat_sketch(
                gradient.view(1, *matrix_shape(gradient.shape)),
                name,
                CountSketch(PROJ_DIM),
                out=truth,
            )
        expect(sketches[3], truth, "merit-fast")

    with sketched(work) as step:
        yield step, check


@contextlib.contextmanager
def less_loop(work: Work, project: bool) -> Iterator[tuple[Run, Check]]:
    """A backward pass for each example by itself, all gradients end to end, then a CountSketch from tables."""
    hashes = tables(work.model) if project else None
    one = [token_work_row(work, b) for b in range(work.batch)]

    def run() -> list[Tensor]:
        rows = []
        for losses in one:
            work.model.zero_grad()
            losses().sum().backward()
            row = torch.cat([parameter.grad.flatten() for parameter in work.model.parameters()])  # type: ignore[union-attr]
            rows.append(scatter(row[None], *hashes)[0] if hashes else row)
        work.model.zero_grad()
        return rows

    def check(rows: list[Tensor]) -> None:
        exact = flat(exact_gradients(work, 3))
        expect(
            rows[3], scatter(exact[None], *hashes)[0] if hashes else exact, "the loop over examples"
        )

    yield run, check


def token_work_row(work: Work, b: int) -> Callable[[], Tensor]:
    ids = work.ids[b : b + 1]  # type: ignore[attr-defined]
    return lambda: mean_losses(work.model(input_ids=ids).logits, ids)


@contextlib.contextmanager
def opacus(work: Work, project: bool) -> Iterator[tuple[Run, Check]]:
    """GradSampleModule: every example's gradient of every parameter in memory."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(work.model, loss_reduction="sum", strict=False)
    hashes = tables(work.model) if project else None

    def run() -> Any:
        backward(work)
        samples = {name: p.grad_sample for name, p in work.model.named_parameters()}
        result = samples
        if hashes:
            result = scatter(
                torch.cat([sample.flatten(1) for sample in samples.values()], 1), *hashes
            )
        for parameter in work.model.parameters():
            parameter.grad_sample = None  # type: ignore[attr-defined]
        return result

    def check(result: Any) -> None:
        exact = exact_gradients(work, 3)
        if hashes:
            expect(result[3], scatter(flat(exact)[None], *hashes), "opacus")
            return
        for name, gradient in exact.items():
            expect(result[name][3], gradient, f"opacus, {name}")

    try:
        yield run, check
    finally:
        wrapped.to_standard_module()


@contextlib.contextmanager
def bergson(work: Work, freeze: bool) -> Iterator[tuple[Run, Check]]:
    """Its collector with 64 x 64 projections: weights (without bias) of linear layers only."""
    from bergson.collector.collector import HookCollectorBase
    from bergson.gradients import GradientProcessor

    class Collector(HookCollectorBase):
        def setup(self) -> None:
            self.found: dict[str, Tensor] = {}

        def teardown(self) -> None:
            self.found = {}

        def backward_hook(self, module: nn.Module, g: Tensor) -> None:
            self.found[module._name] = self._compute_gradient(module, g)  # type: ignore[index]

        def process_batch(self, indices: list[int], **kwargs: Any) -> None:
            self.found = {}

    collector = Collector(work.model, processor=GradientProcessor(projection_dim=SIDE))

    def run() -> dict[str, Tensor]:
        with collector.with_batch(None):
            backward(work)
        found = collector.found
        collector.found = {}
        return found

    def check(found: dict[str, Tensor]) -> None:
        exact = exact_gradients(work, 3)
        linear = {
            name for name, module in work.model.named_modules() if isinstance(module, nn.Linear)
        }
        assert found.keys() == linear, "bergson: covers other layers than the linear ones"
        for name, projected in found.items():
            gradient = exact[f"{name}.weight"]
            left = collector.projection(
                name, SIDE, gradient.shape[0], "left", gradient.device, gradient.dtype
            )
            right = collector.projection(
                name, SIDE, gradient.shape[1], "right", gradient.device, gradient.dtype
            )
            expect(projected[3], left @ gradient @ right.T, f"bergson, {name}")

    with frozen(work) if freeze else contextlib.nullcontext():
        yield run, check


@contextlib.contextmanager
def dattri_llm(work: Work, style: str) -> Iterator[tuple[Run, Check]]:
    """HookManager's per-example gradients of linear and embedding layers, as factors or contracted at once."""
    from dattri_llm import HookManager, HookManagerConfig

    layers = {
        n: m for n, m in work.model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)
    }
    config = HookManagerConfig(hook_types=dict.fromkeys(layers, "linear_io"), capture_style=style)
    manager = HookManager(work.model, config=config)

    def run() -> Any:
        backward(work)
        return manager.get_gradient()

    def check(gradient: Any) -> None:
        found = gradient.materialize().data
        assert found.keys() == layers.keys(), "dattri-llm: covers other layers than asked for"
        exact = exact_gradients(work, 3)
        for name, layer in layers.items():
            truth = exact[f"{name}.weight"].flatten()
            if getattr(layer, "bias", None) is not None:
                truth = torch.cat(
                    [exact[f"{name}.weight"], exact[f"{name}.bias"][:, None]], 1
                ).flatten()
            expect(found[name][3], truth, f"dattri-llm, {name}")

    try:
        with manager.collect():
            yield run, check
    finally:
        manager.remove()


def per_example(work: Work) -> dict[str, Tensor]:
    """vmap(grad): [B, *shape] for every parameter, what TRAK and dattri project."""
    parameters = {name: parameter.detach() for name, parameter in work.model.named_parameters()}

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        output = torch.func.functional_call(work.model, values, (), {"input_ids": ids[None]})
        return mean_losses(output.logits, ids[None])[0]

    found: dict[str, Tensor] = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
        parameters, work.ids
    )  # type: ignore[attr-defined]
    return found


@contextlib.contextmanager
def vmapped(work: Work, projector: Any = None) -> Iterator[tuple[Run, Check]]:
    def run() -> Tensor:
        rows = torch.cat([gradient.flatten(1) for gradient in per_example(work).values()], 1)
        return rows if projector is None else projector(rows)

    def check(result: Tensor) -> None:
        exact = flat(exact_gradients(work, 3))[None].expand(BATCH, -1)
        expect(
            result[3],
            exact[3] if projector is None else projector(exact.contiguous())[3],
            "vmap(grad)",
        )

    yield run, check


@contextlib.contextmanager
def trak(work: Work) -> Iterator[tuple[Run, Check]]:
    from trak.projectors import BasicProjector, ProjectionType

    count = sum(parameter.numel() for parameter in work.model.parameters())
    kind = ProjectionType.rademacher
    projector = BasicProjector(count, DIMENSIONS, 0, kind, torch.device("cpu"), block_size=BLOCK)
    with vmapped(work, lambda rows: projector.project(rows, model_id=0)) as steps:
        yield steps


@contextlib.contextmanager
def dattri(work: Work, kind: str) -> Iterator[tuple[Run, Check]]:
    from dattri.func.projection import random_project

    count = sum(parameter.numel() for parameter in work.model.parameters())
    dimensions = DIMENSIONS if kind == "normal" else PROJ_DIM
    projector = random_project(torch.empty(BATCH, count), BATCH, dimensions, BATCH, proj_type=kind)
    with vmapped(work, projector) as steps:
        yield steps


PEERS: dict[str, Steps] = {
    "merit-fast": {f"merit-fast, all parameters to {PROJ_DIM}": merit_fast},
    "opacus": {
        "opacus, nothing projected": lambda work: opacus(work, project=False),
        f"opacus, then index_add_ to {PROJ_DIM}": lambda work: opacus(work, project=True),
    },
    "bergson": {
        "bergson, 64 x 64 a layer, linear layers only": lambda work: bergson(work, freeze=False),
        "bergson, the same, weights frozen": lambda work: bergson(work, freeze=True),
    },
    "dattri": {
        "dattri, vmap(grad), random_mask": lambda work: dattri(work, "random_mask"),
        f"dattri, vmap(grad), dense, {DIMENSIONS} numbers only": lambda work: dattri(
            work, "normal"
        ),
    },
    "dattri-llm": {
        "dattri-llm, factors, no norms": lambda work: dattri_llm(work, "factorized"),
        "dattri-llm, materialized, no norms": lambda work: dattri_llm(work, "materialized"),
    },
    "trak": {
        "vmap(grad), nothing projected": vmapped,
        f"TRAK BasicProjector, {DIMENSIONS} numbers only": trak,
    },
    "less": {
        "loop over examples, nothing projected": lambda work: less_loop(work, project=False),
        f"loop over examples, index_add_ to {PROJ_DIM}": lambda work: less_loop(work, project=True),
    },
}


def measure(arguments: argparse.Namespace, work: Work) -> dict[str, float]:
    steps = PEERS[arguments.peer]
    if arguments.peer in ("trak", "dattri"):
        work.model.set_attn_implementation("eager")  # type: ignore[operator]  # vmap refuses masks of sdpa
    for make in steps.values():
        with make(work) as (run, check):
            result = run()
        work.model.zero_grad()
        check(result)  # outside: the peer's hooks are gone
        del result
        work.model.zero_grad()
    found = {}
    for number in range(arguments.rounds):
        for name in rotated(["plain", *steps], number):
            with plain(work) if name == "plain" else steps[name](work) as step:
                taken = timed(step if name == "plain" else step[0])
            work.model.zero_grad()
            found |= {f"{number}/{name}/{key}": value for key, value in taken.items()}
    assert all(math.isfinite(value) for value in found.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = token_work(
        small_model("fp32", arguments.quick), BATCH, 16 if arguments.quick else arguments.tokens
    )
    print(json.dumps(measure(arguments, work)))


if __name__ == "__main__":
    main()
