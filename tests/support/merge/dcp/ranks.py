"""Ranks of torch.distributed over gloo, forked: they write and load distributed checkpoints.

    python -m support.merge.dcp.ranks write FOLDER
    python -m support.merge.dcp.ranks load CHECKPOINT 1,2,4 FOLDER

``load`` shards otherwise than the writer did, with so many ranks in turn, and saves the whole
tensors as FOLDER/1.safetensors and so on.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support.merge.dcp.tensors import PLACEMENTS, SEEDS, tiny_llama, whole_tensors
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import start_processes

WRITERS = 4


def run_ranks(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs ``work(rank, *arguments)`` on so many forked ranks."""
    forked: Any = start_processes
    forked(_rank, (count, work, arguments), nprocs=count, start_method="fork")


def _rank(rank: int, count: int, work: Callable[..., None], arguments: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    meeting = f"file://{arguments[-1]}.store{count}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def distributed(tensor: Tensor, mesh: DeviceMesh, words: str) -> Tensor:
    """A tensor by one letter per dimension of the mesh: 0 or 1 shards it, r replicates it.

    "-": no DTensor.
    """
    if words == "-":
        return tensor
    placements = [Replicate() if word == "r" else Shard(int(word)) for word in words]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def write(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    line = init_device_mesh("cpu", (WRITERS,))
    for name, seed in SEEDS.items():
        tensors = {
            key: distributed(tensor, mesh, PLACEMENTS[key])
            for key, tensor in whole_tensors(seed).items()
        }
        state: dict[str, Any] = {"model": tensors, "step": seed, "scalar": torch.tensor(seed)}
        state["optimizer"] = {"state": {"grid": {"exp_avg": tensors["grid"]}}}
        save(state, checkpoint_id=folder / f"grid-{name}")
        model = tiny_llama(seed)
        fully_shard(model, mesh=line)
        accelerate = folder / f"checkpoint-{name}"
        weights = model.state_dict()
        save({"model": weights}, checkpoint_id=accelerate / "pytorch_model_fsdp_0")
        moments = {"optimizer": {"state": {"0": {"exp_avg": next(iter(weights.values()))}}}}
        save(moments, checkpoint_id=accelerate / "optimizer_0")
        hub = HuggingFaceStorageWriter(str(folder / f"sharded-{name}"), save_distributed=True)
        save(weights, storage_writer=hub)
        if name == "1":  # as torchtitan nests it
            flat = {**weights, **moments, "train_state": {"step": 3}}
            save(flat, checkpoint_id=folder / f"flat-{name}")


def load(rank: int, wanted: Mapping[str, Tensor], nested: bool, checkpoint: str, out: Path) -> None:
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    last = {name: str(min(tensor.ndim - 1, 1)) for name, tensor in wanted.items()}
    empty: dict[str, Any] = {
        name: distributed(torch.zeros_like(tensor), mesh, last[name] if tensor.ndim else "-")
        for name, tensor in wanted.items()
    }
    load_state({"model": empty} if nested else empty, checkpoint_id=checkpoint)
    full = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in empty.items()
    }
    if rank == 0:
        save_file({name: value.contiguous() for name, value in full.items()}, out)


def main() -> None:
    act, *words = sys.argv[1:]
    if act == "write":
        run_ranks(WRITERS, write, Path(words[0]))
        return
    checkpoint, counts, folder = words
    is_grid = "grid" in checkpoint
    wanted = whole_tensors(0) if is_grid else tiny_llama(0).state_dict()
    for count in map(int, counts.split(",")):
        out = Path(folder) / f"{count}.safetensors"
        run_ranks(count, load, dict(wanted), "flat" not in checkpoint, checkpoint, out)


if __name__ == "__main__":
    main()
