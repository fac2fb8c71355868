"""Checks of plain tensors among several processes: FSDP1, ZeroRedundancyOptimizer, DDP."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.kernels.ranks.models import Rows, assert_near, loss_of, whole
from support.kernels.ranks.sharded import SETTINGS, torchs
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from merit_fast.kernels.optimizer import FusedAdamW


def train(model: nn.Module, optimizer: Any, steps: int = 4) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(steps):
        loss_of(model, step, dist.get_rank(), dist.get_world_size()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def fsdp1_needs_a_group(folder: Path) -> None:
    def wrapped() -> Any:
        return FullyShardedDataParallel(Rows(), use_orig_params=True, device_id=torch.device("cpu"))

    model = wrapped()
    optimizer = FusedAdamW(model.parameters(), **SETTINGS, max_norm=0.5)
    try:
        train(model, optimizer, 1)
    except ValueError as error:
        assert "pass shard_group=" in str(error), error
    else:
        raise AssertionError("a step clipped by the norm of a shard")
    model = wrapped()
    group = dist.group.WORLD
    train(model, FusedAdamW(model.parameters(), **SETTINGS, max_norm=0.5, shard_group=group))
    with FullyShardedDataParallel.summon_full_params(model):
        assert_near(model.parameters(), torchs(dist.get_world_size()))


def zero_clips_by_the_norm_of_all(folder: Path) -> None:
    model = DistributedDataParallel(Rows())
    options: Any = {**SETTINGS, "max_norm": 0.5, "shard_group": dist.group.WORLD}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), FusedAdamW, **options)
    train(model, optimizer)
    assert_near(model.parameters(), torchs(dist.get_world_size()))
    optimizer.consolidate_state_dict(0)
    if dist.get_rank() == 0:
        state = optimizer.state_dict()
        assert sorted(state["state"]) == list(range(5))


def a_rank_without_parameters_takes_part(folder: Path) -> None:
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    options: Any = {"max_norm": 1.0, "shard_group": dist.group.WORLD}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), FusedAdamW, **options)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert torch.allclose(model.weight, torch.full((1, 3), 1 - 1e-3))


def ddp_steps_as_one_process(folder: Path) -> None:
    model = DistributedDataParallel(Rows())
    train(model, FusedAdamW(model.parameters(), **SETTINGS, max_norm=0.5))
    assert_near(model.parameters(), torchs(dist.get_world_size()))


def ddp_updates_in_the_pass(folder: Path) -> None:
    """Clipping, accumulation, a schedule and DDP together, with and without ``no_sync``."""
    ranks, parts = dist.get_world_size(), 2
    truth = torchs(ranks * parts)
    for views in (False, True):
        for no_sync in (False, True):
            model = DistributedDataParallel(Rows(), gradient_as_bucket_view=views)
            optimizer = FusedAdamW(model.parameters(), **SETTINGS, max_norm=0.5)
            accumulation = 1 if no_sync else parts
            optimizer.step_in_backward(clip="two-pass", accumulation=accumulation, ddp=model)
            optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            for step in range(4):
                for part in range(parts):
                    place = part * ranks + dist.get_rank()
                    unsynced = no_sync and part < parts - 1
                    with model.no_sync() if unsynced else nullcontext():
                        (loss_of(model, step, place, ranks * parts) / parts).backward()
                before = model.module.first.weight.detach().clone()
                optimizer.step()  # nothing is left to it
                assert torch.equal(before, model.module.first.weight)
                schedule.step()
                optimizer.zero_grad()
            assert_near(model.parameters(), truth)
            both = [torch.empty_like(whole(p)) for p in model.parameters()]
            for mine, other in zip(model.parameters(), both, strict=True):
                other.copy_(mine.detach())
                dist.broadcast(other, 0)
                assert torch.equal(mine, other)


def plain_hooks_are_refused(folder: Path) -> None:
    optimizer = FusedAdamW(Rows().parameters())
    try:
        optimizer.step_in_backward()
    except ValueError as error:
        assert "before they are reduced" in str(error), error
    else:
        raise AssertionError("hooks were set that see gradients of one process")
    model = Rows()
    optimizer = FusedAdamW(model.parameters())
    optimizer.step_in_backward(reduced=True)
    loss_of(model, 0, dist.get_rank(), 2).backward()
    optimizer.step()
    assert int(optimizer.state[model.first.weight]["step"]) == 1
