"""Steps of every peer, each with a check of its result against exact gradients.

merit-fast runs in its own environment, the others without it, so every library is imported where
its step is opened.
"""

import contextlib
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
    relative_error,
    sketched,
)

BATCH = 8
BOUND = 2e-4
SIDE = 64  # bergson projects to 64 x 64 per layer
DIMENSIONS = 16  # width of the dense projections
BLOCK = 8  # projected at a time by TRAK
Run = Callable[[], Any]
Check = Callable[[Any], None]
Steps = dict[str, Callable[[Work], contextlib.AbstractContextManager[tuple[Run, Check]]]]


def tables(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Draws a CountSketch's buckets and signs, 12 bytes per parameter, before the time starts."""
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
    """Runs a backward pass per example; projects its flat gradient by a CountSketch from tables."""
    hashes = tables(work.model) if project else None
    examples = [losses_of_example(work, b) for b in range(work.batch)]

    def run() -> list[Tensor]:
        rows = []
        for losses in examples:
            work.model.zero_grad()
            losses().sum().backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad for p in work.model.parameters() if p.grad is not None]
            row = torch.cat([gradient.flatten() for gradient in gradients])
            rows.append(scatter(row[None], *hashes)[0] if hashes else row)
        work.model.zero_grad()
        return rows

    def check(rows: list[Tensor]) -> None:
        exact = flat(exact_gradients(work, 3))
        truth = scatter(exact[None], *hashes)[0] if hashes else exact
        expect(rows[3], truth, "the loop over examples")

    yield run, check


def losses_of_example(work: Work, b: int) -> Callable[[], Tensor]:
    assert work.ids is not None
    ids = work.ids[b : b + 1]
    return lambda: mean_losses(work.model(input_ids=ids).logits, ids)


@contextlib.contextmanager
def opacus(work: Work, project: bool) -> Iterator[tuple[Run, Check]]:
    """Takes GradSampleModule's gradient of every parameter and example, all in memory."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(work.model, loss_reduction="sum", strict=False)
    hashes = tables(work.model) if project else None

    def run() -> Any:
        backward(work)
        parameters: dict[str, Any] = dict(work.model.named_parameters())
        samples = {name: parameter.grad_sample for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.grad_sample = None
        if not hashes:
            return samples
        return scatter(torch.cat([sample.flatten(1) for sample in samples.values()], 1), *hashes)

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
    """Runs bergson's collector with 64 x 64 projections of the weights of linear layers."""
    from bergson.collector.collector import HookCollectorBase
    from bergson.gradients import GradientProcessor

    class Collector(HookCollectorBase):  # type: ignore[misc]
        def setup(self) -> None:
            self.projected: dict[str, Tensor] = {}

        def teardown(self) -> None:
            self.projected = {}

        def backward_hook(self, module: nn.Module, g: Tensor) -> None:
            self.projected[module._name] = self._compute_gradient(module, g)  # type: ignore[index]

        def process_batch(self, indices: list[int], **kwargs: Any) -> None:
            self.projected = {}

    collector = Collector(work.model, processor=GradientProcessor(projection_dim=SIDE))

    def run() -> dict[str, Tensor]:
        with collector.with_batch(None):
            backward(work)
        result = collector.projected
        collector.projected = {}
        return result

    def check(result: dict[str, Tensor]) -> None:
        exact = exact_gradients(work, 3)
        linear = {
            name for name, module in work.model.named_modules() if isinstance(module, nn.Linear)
        }
        assert result.keys() == linear, "bergson: covers other layers than the linear ones"
        for name, projected in result.items():
            gradient = exact[f"{name}.weight"]
            rows, columns = gradient.shape
            kind = (gradient.device, gradient.dtype)
            left = collector.projection(name, SIDE, rows, "left", *kind)
            right = collector.projection(name, SIDE, columns, "right", *kind)
            expect(projected[3], left @ gradient @ right.T, f"bergson, {name}")

    with frozen(work) if freeze else contextlib.nullcontext():
        yield run, check


@contextlib.contextmanager
def dattri_llm(work: Work, style: str) -> Iterator[tuple[Run, Check]]:
    """Takes HookManager's per-example gradients of linear and embedding layers, in one style."""
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
        result = gradient.materialize().data
        assert result.keys() == layers.keys(), "dattri-llm: covers other layers than asked for"
        exact = exact_gradients(work, 3)
        for name, layer in layers.items():
            truth = exact[f"{name}.weight"].flatten()
            if getattr(layer, "bias", None) is not None:
                columns = [exact[f"{name}.weight"], exact[f"{name}.bias"][:, None]]
                truth = torch.cat(columns, 1).flatten()
            expect(result[name][3], truth, f"dattri-llm, {name}")

    try:
        with manager.collect():
            yield run, check
    finally:
        manager.remove()


def per_example(work: Work) -> dict[str, Tensor]:
    """Runs vmap(grad), whose result [B, *shape] per parameter TRAK and dattri project."""
    parameters = {name: parameter.detach() for name, parameter in work.model.named_parameters()}

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        output = torch.func.functional_call(work.model, values, (), {"input_ids": ids[None]})
        return mean_losses(output.logits, ids[None])[0]

    assert work.ids is not None
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    result: dict[str, Tensor] = gradients(parameters, work.ids)
    return result


@contextlib.contextmanager
def vmapped(work: Work, projector: Any = None) -> Iterator[tuple[Run, Check]]:
    def run() -> Tensor:
        rows = torch.cat([gradient.flatten(1) for gradient in per_example(work).values()], 1)
        return rows if projector is None else projector(rows)

    def check(result: Tensor) -> None:
        exact = flat(exact_gradients(work, 3))[None].expand(BATCH, -1)
        truth = exact if projector is None else projector(exact.contiguous())
        expect(result[3], truth[3], "vmap(grad)")

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
