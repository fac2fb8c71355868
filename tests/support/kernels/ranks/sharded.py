"""Checks of DTensors: FSDP2, its hybrid form, column shards, distributed checkpoints."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.kernels.ranks.models import (
    Rows,
    assert_near,
    assert_same_bits,
    assert_same_states,
    loss_of,
    set_gradients,
    sharded,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as read_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as write_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from merit_fast.kernels.optimizer import FusedAdamW, SpentGradient

BF16 = torch.bfloat16
SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "seed": 3}
KINDS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"max_norm": 0.5}),
    (BF16, {"average_decay": 0.9, "zero_grad": True}),
    (BF16, {"moments": "bf16", "max_norm": 0.5}),
    (BF16, {"master": "split"}),
    (BF16, {"master": "split8"}),
    (BF16, {"master": "fp32", "moments": "bf16"}),
]


def line() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def norm_of(optimizer: FusedAdamW) -> float:
    assert optimizer.grad_norm is not None
    return float(optimizer.grad_norm)


def train(model: nn.Module, steps: int = 3, first: int = 0, **options: Any) -> FusedAdamW:
    optimizer = FusedAdamW(model.parameters(), **SETTINGS, **options)
    for step in range(first, first + steps):
        set_gradients(model.parameters(), step)
        optimizer.step()
    return optimizer


def fsdp2_rounds_as_one_process(folder: Path) -> None:
    for dtype, options in KINDS:
        one, many = Rows(dtype), sharded(Rows(dtype), line())
        assert_same_states(train(one, **options), train(many, **options))
        assert_same_bits(one.parameters(), many.parameters())
    one, many = Rows(BF16), sharded(Rows(BF16), line())
    eight: list[dict[str, Any]] = [{}, {"rounding": "nearest"}]
    for options in eight:
        states = [
            train(each, moments="int8", **options).state[each.first.weight] for each in (one, many)
        ]
        assert states[1]["exp_avg"].dtype == torch.int8 and states[1]["exp_avg"].shape == (5, 256)
        assert torch.equal(states[0]["exp_avg"], whole(states[1]["exp_avg"]))
        assert_same_bits([one.first.weight], [many.first.weight])


def columns_round_as_one_process(folder: Path) -> None:
    values = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1)).to(BF16)
    for dim in range(3):
        one = nn.Parameter(values.clone())
        many = nn.Parameter(distribute_tensor(values.clone(), line(), [Shard(dim)]))
        for parameter in (one, many):
            optimizer = FusedAdamW([parameter], **SETTINGS, moments="bf16")
            for step in range(3):
                set_gradients([parameter], step)
                optimizer.step()
        assert_same_bits([one], [many])


def copies_count_once_and_unreduced_gradients_are_summed(folder: Path) -> None:
    ranks = dist.get_world_size()
    copied = nn.Parameter(distribute_tensor(torch.ones(3, 5), line(), [Replicate()]))
    optimizer = FusedAdamW([copied], max_norm=float("inf"))
    for placement, expected in ((Replicate(), 15.0), (Partial(), 15.0 * ranks**2)):
        copied.grad = DTensor.from_local(torch.ones(3, 5), line(), [placement])
        optimizer.step()
        assert norm_of(optimizer) == expected**0.5, (placement, optimizer.grad_norm)
    optimizer = FusedAdamW([copied], zero_grad=True)
    copied.grad = DTensor.from_local(torch.ones(3, 5), line(), [Partial()])
    optimizer.step()
    assert not copied.grad.to_local().any()  # type: ignore[union-attr]


def torchs(parts: int, steps: int = 4, max_norm: float = 0.5) -> list[nn.Parameter]:
    """The weights of torch's AdamW in one process, with a clip and a schedule."""
    model = Rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(steps):
        for part in range(parts):
            (loss_of(model, step, part, parts) / parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return list(model.parameters())


def fsdp2_trains_as_torch_does(folder: Path) -> None:
    ranks = dist.get_world_size()
    model = sharded(Rows(), line())
    optimizer = FusedAdamW(model.parameters(), **SETTINGS, max_norm=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(4):
        loss_of(model, step, dist.get_rank(), ranks).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_near(model.parameters(), torchs(ranks))


def fsdp2_updates_in_the_pass(folder: Path) -> None:
    """Accumulation by ``set_requires_gradient_sync``, a schedule, and the previous norm."""
    results = []
    for in_backward in (False, True):
        model = sharded(Rows(BF16).float(), line())
        optimizer = FusedAdamW(model.parameters(), **SETTINGS, moments="bf16", max_norm=1e9)
        if in_backward:
            optimizer.step_in_backward(clip="previous")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(3):
            for part in range(2):
                model.set_requires_gradient_sync(part == 1)
                loss_of(model, step, 2 * part + dist.get_rank(), 4).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
            local = model.first.weight.grad.to_local()
            assert isinstance(local, SpentGradient) == in_backward
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        results.append((list(model.parameters()), whole(norm), norm_of(optimizer)))
    assert_same_bits(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1])
    assert abs(results[0][2] / results[1][2] - 1) < 1e-6
    loss_of(model, 0, 0, 4).backward()
    try:
        loss_of(model, 0, 0, 4).backward()
    except RuntimeError as error:
        assert "pass accumulation=N" in str(error), error
    else:
        raise AssertionError("a second pass was taken")


def one_nan_leaves_the_step_out_on_every_rank(folder: Path) -> None:
    model = sharded(Rows(), line())
    optimizer = FusedAdamW(model.parameters(), skip_nonfinite=True)
    before = [whole(p).clone() for p in model.parameters()]
    set_gradients(model.parameters(), 0)
    if dist.get_rank() == 1:
        model.first.weight.grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    assert_same_bits(before, model.parameters())
    assert optimizer.num_skipped == 1 and not optimizer.state


def checkpoints_resume_to_the_bit(folder: Path) -> None:
    kinds = [*KINDS, (BF16, {"moments": "int8", "average_decay": "mean"})]
    for number, (dtype, options) in enumerate(kinds):
        model = sharded(Rows(dtype), line())
        optimizer = train(model, 2, **options)
        saved = {"model": model.state_dict(), "step": get_optimizer_state_dict(model, optimizer)}
        write_checkpoint(saved, checkpoint_id=folder / f"kind{number}")
        set_gradients(model.parameters(), 2)
        optimizer.step()
        again = sharded(Rows(dtype), line())
        fresh = FusedAdamW(again.parameters(), **{**SETTINGS, "seed": 99}, **options)
        load(folder / f"kind{number}", again, fresh)
        assert fresh.options.seed == SETTINGS["seed"]
        set_gradients(again.parameters(), 2)
        fresh.step()
        assert_same_states(optimizer, fresh)
        assert_same_bits(model.parameters(), again.parameters())


def load(folder: Path, model: nn.Module, optimizer: FusedAdamW) -> None:
    found = {"model": model.state_dict(), "step": get_optimizer_state_dict(model, optimizer)}
    read_checkpoint(found, checkpoint_id=folder)
    model.load_state_dict(found["model"])
    set_optimizer_state_dict(model, optimizer, found["step"])


def whole_states_load_into_shards(folder: Path) -> None:
    """A plain model takes the states of shards too."""
    for dtype, options in KINDS:
        one = Rows(dtype)
        optimizer = train(one, **options)
        many = sharded(Rows(dtype), line())
        other = FusedAdamW(many.parameters(), **SETTINGS, **options)
        other.load_state_dict(optimizer.state_dict())
        assert_same_states(optimizer, other)
        back = FusedAdamW(Rows(dtype).parameters(), **SETTINGS, **options)
        back.load_state_dict(other.state_dict())
        assert_same_states(optimizer, back)


def other_kinds_are_refused(folder: Path) -> None:
    model = sharded(Rows(BF16), line())
    saved = train(model, 1, moments="int8").state_dict()
    try:
        FusedAdamW(model.parameters()).load_state_dict(saved)
    except ValueError as error:
        assert "made with moments='int8'" in str(error), error
    else:
        raise AssertionError("8-bit moments were loaded as float32")
    columns = distribute_tensor(torch.ones(4, 512, dtype=BF16), line(), [Shard(1)])
    try:
        optimizer = FusedAdamW([nn.Parameter(columns)], moments="int8")
        set_gradients([m.parameter for m in optimizer.members()], 0)
        optimizer.step()
    except ValueError as error:
        assert "sharded by rows" in str(error), error
    else:
        raise AssertionError("8-bit moments of column shards were taken")


def hybrid_shards_count_once(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    for dtype, options in KINDS:
        one, many = Rows(dtype), sharded(Rows(dtype), mesh)
        first, second = train(one, **options), train(many, **options)
        assert_same_states(first, second)
        assert_same_bits(one.parameters(), many.parameters())
        if "max_norm" in options:
            assert abs(norm_of(first) / norm_of(second) - 1) < 1e-12


def strided_shards_round_to_nearest_only(folder: Path) -> None:
    """FSDP2 over tensor parallelism of one dimension."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    one, many = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
    many.weight = nn.Parameter(one.weight.detach().clone())
    parallelize_module(many, mesh["tensor"], ColwiseParallel())
    fully_shard(many, mesh=mesh["data"])
    assert "_StridedShard" in str(many.weight.placements)  # type: ignore[attr-defined]
    first, second = train(one, max_norm=0.5), train(many, max_norm=0.5)
    assert_same_bits(one.parameters(), many.parameters())
    assert abs(norm_of(first) / norm_of(second) - 1) < 1e-12
    try:
        train(many, 1, moments="bf16")
    except ValueError as error:
        assert "needs the place of every element" in str(error), error
    else:
        raise AssertionError("rounded at unknown places")


def other_meshes_load_checkpoints(folder: Path) -> None:
    """A run of two ranks resumes on four, to the bit."""
    for number, (dtype, options) in enumerate(KINDS):
        model = sharded(Rows(dtype), line())
        optimizer = FusedAdamW(model.parameters(), **SETTINGS, **options)
        load(folder / f"kind{number}", model, optimizer)
        set_gradients(model.parameters(), 2)
        optimizer.step()
        one = Rows(dtype)
        assert_same_states(train(one, **options), optimizer)
        assert_same_bits(one.parameters(), model.parameters())
        assert isinstance(optimizer.state[model.first.weight]["exp_avg"], DTensor)
