"""One of the processes among which FSDP2 or tensor parallelism divides a sketched model.

python -m support.sketch.ranks RANK SIZE FOLDER CASE...
"""

import datetime
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.sketch.exact_gradients import SIZES, SKETCH, ragged_examples, summed_loss, tiny
from support.sketch.odd_modules import TimeFirst
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import merit_fast
from merit_fast.errors import MeritFastError
from merit_fast.sketch.capture import coverage
from merit_fast.sketch.gradients import GradientSketcher

LENGTHS = [(9, 14, 5), (7,)]  # of each process's examples


def divided(model: Any) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    result: nn.Module = model
    return result


def _silent(line: str) -> None: ...


def sketched(model: nn.Module, examples: Any, datasets: list[str]) -> tuple[Tensor, Any]:
    """Sketches of the last of some passes, of which the first is checked, and the sketcher."""
    found = torch.zeros(0)
    with GradientSketcher(model, SKETCH) as sketcher:
        for dataset in datasets:
            summed_loss(model, examples).backward()  # type: ignore[no-untyped-call]
            found = sketcher.update([dataset] * len(examples), blocks=range(len(examples)))
    return found, sketcher


def equal_bits(rank: int) -> None:
    """Sketches have the bits of whole models; the sums are the same in every process."""
    for architecture, tied in (("llama", True), ("mixtral", False)):
        examples = ragged_examples(LENGTHS[rank])
        model = divided(tiny(architecture, tied))
        found, sketcher = sketched(model, examples, ["a", f"of {rank}"])
        whole, expected = sketched(tiny(architecture, tied), examples, ["a", f"of {rank}"])
        assert torch.equal(found, whole), architecture
        assert sketcher.identity == expected.identity
        assert sketcher.checked.sum_error < 2e-6 and sketcher.slow_parameters == {}
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        state, _ = sketcher.sum_over_processes()
        assert list(state) == ["a", "of 0", "of 1"]
        assert state["a"].num_examples == sum(map(len, LENGTHS))
        told: list[Any] = [None, None]
        dist.all_gather_object(told, (state["a"].block_sums, expected.state["a"].block_sums))
        assert torch.equal(told[0][0], told[1][0])
        assert torch.equal(state["a"].block_sums, told[0][1] + told[1][1])


class _Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(6, 6)
        self.inner = TimeFirst()
        self.after = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.after(self.inner(self.before(x)))


def slow(rank: int) -> None:
    """A parameter that one process cannot cover takes a pass per example in both."""
    x = torch.randn(1 + 2 * rank, 5, 6, generator=torch.Generator().manual_seed(rank))
    model = _Middle()
    exact = torch.zeros(len(x), SKETCH.proj_dim)
    with GradientSketcher(_Middle(), SKETCH, uncovered="autograd") as sketcher:
        for example in range(len(x)):
            sketcher.model(x[example : example + 1]).square().sum().backward()
            exact[example] = sketcher.take()[0]
    fully_shard(model.inner)
    fully_shard(model)
    with GradientSketcher(model, SKETCH, uncovered="autograd", notify=_silent) as sketcher:
        model(x).square().sum().backward()
        found = sketcher.take()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
    assert [*sketcher.slow_parameters] == ["inner.linear.weight", "inner.linear.bias"]


def wrong_formula(rank: int) -> None:
    """A formula that one process gets wrong: refused in both, or a pass per example in both."""
    right = coverage.linear_backward
    if rank == 1:

        def twice(site: Any, run: Any, dy: Tensor, x: Tensor) -> None:
            right(site, run, 2 * dy, x)

        coverage.linear_backward = twice
    examples = ragged_examples(LENGTHS[rank])
    model = divided(tiny("llama"))
    with GradientSketcher(model, SKETCH) as sketcher:
        summed_loss(model, examples).backward()  # type: ignore[no-untyped-call]
        try:
            sketcher.take()
        except MeritFastError as error:
            assert "fails the check: the sketch of one example differs" in str(error), error
            assert str(error).startswith("process 1: ") == (rank == 0), error
        else:
            raise AssertionError("a wrong sketch was taken")
    with GradientSketcher(model, SKETCH, uncovered="autograd", notify=_silent) as sketcher:
        summed_loss(model, examples).backward()  # type: ignore[no-untyped-call]
        found = sketcher.take()
    coverage.linear_backward = right
    exact, _ = sketched(tiny("llama"), examples, ["a"])
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    assert "lm_head.weight" in sketcher.slow_parameters
    assert all(p.grad is None for p in model.parameters())


def _model(norms: bool) -> Any:
    """A Llama, or a Qwen3 with norms of its heads, whose sizes two processes can divide."""
    import transformers as t

    sizes: dict[str, Any] = {**SIZES, "hidden_size": 40, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": False}
    config = t.Qwen3Config(**sizes, head_dim=12) if norms else t.LlamaConfig(**sizes, mlp_bias=True)
    torch.manual_seed(0)
    auto: Any = t.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tensor_parallel(rank: int) -> None:
    """Slices of linear layers and embeddings add up to the sketches of the whole model."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    examples = ragged_examples(LENGTHS[0])  # the same in both
    rows = {"o_proj", "down_proj"}
    for norms in (False, True):
        model = _model(norms)
        plan: dict[str, Any] = {
            name: RowwiseParallel() if name.split(".")[-1] in rows else ColwiseParallel()
            for name, _ in model.named_modules()
            if name.endswith("_proj")
        }
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
        model = parallelize_module(model, mesh, plan)
        if norms:  # a process has the gradient of its own heads only
            try:
                sketched(model, examples, ["a"])
            except MeritFastError as error:
                assert "_norm.weight must have one gradient in all processes" in str(error), error
            else:
                raise AssertionError("a part of a gradient was taken for all of it")
            continue
        found, sketcher = sketched(model, examples, ["a", "b"])
        whole, expected = sketched(_model(norms), examples, ["a", "b"])
        assert (found - whole).norm() < 1e-6 * whole.norm()
        assert sketcher.identity == expected.identity
        assert sketcher.checked.sum_error < 2e-6 and sketcher.checked.row_error < 2e-6
        sums: list[Any] = [None, None]
        dist.all_gather_object(sums, sketcher.state["a"].block_sums)
        assert torch.equal(*sums)
        for refused in (
            sketcher.sum_over_processes,
            functools.partial(GradientSketcher, model, SKETCH, check="never"),
            functools.partial(merit_fast.kfac_factors, model),
        ):
            try:
                refused()
            except MeritFastError as error:
                assert "tensor parallelism" in str(error), error
            else:
                raise AssertionError("not refused")


CASES: dict[str, Callable[[int], None]] = {
    case.__name__: case for case in (equal_bits, slow, wrong_formula, tensor_parallel)
}


def main(rank: int, size: int, folder: Path, *names: str) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(size), "RANK": str(rank)}
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{names[0]}"
    minute = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=minute)
    for name in names:
        CASES[name](rank)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may otherwise be torn down while they run


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
