"""One of the processes that train branches together, whole and divided.

    python -m support.train.divided RANK SIZE FOLDER CASE...

FOLDER has the starts ``tied`` and ``untied``. A case trains into FOLDER/CASE.whole and
FOLDER/CASE.divided; ``killed`` ends with kill -9 of the leader, ``resumed`` takes that up.
"""

import datetime
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.tiny import make_model
from support.training import CONFIG, dataset, held_out_rows, job
from torch import Tensor, nn

from merit_fast.errors import InputError
from merit_fast.progress import SilentProgress
from merit_fast.train import TrainConfig
from merit_fast.train.adapter.config import AdapterConfig
from merit_fast.train.optimizer import MasterAdamW, NonFiniteGradient
from merit_fast.train.parallel.load import fill_model, make_hollow_model
from merit_fast.train.parallel.pieces import own_part, rows_of
from merit_fast.train.parallel.ranks import Ranks
from merit_fast.train.parallel.shards import divide_model
from merit_fast.train.stage import BranchJob, follow_branch, train_branch

_EAGER = replace(CONFIG, kernels="eager")
CASES: dict[str, tuple[str, TrainConfig]] = {
    "kept_best": (
        "tied",
        replace(CONFIG, evaluate_steps=2, patience=2, checkpoint_steps=2, clip_norm=0.5),
    ),
    "layers_twice": (
        "untied",
        replace(
            CONFIG,
            dtype="bf16",
            gradient_checkpointing=True,
            freeze=("q_proj", "embed_tokens"),
            weight_decay=0.1,
        ),
    ),
    "lora": (
        "untied",
        replace(_EAGER, adapter=AdapterConfig(kind="lora", rank=2, dropout=0.1), dtype="bf16"),
    ),
    "packed": ("tied", replace(_EAGER, packing=True, accumulation=3, epochs=1)),
    "experts": ("experts", replace(CONFIG, dtype="bf16", max_shard_size="30KB", epochs=1)),
    "stacked": ("stacked", replace(CONFIG, epochs=1)),
    "small_moments": ("tied", replace(_EAGER, optimizer="adamw-8bit", epochs=1)),
}
RESUMED = ("tied", replace(_EAGER, checkpoint_steps=2, clip_norm=0.5))
IN_BACKWARD = ("tied", replace(_EAGER, update_in_backward="two-pass", clip_norm=0.1, epochs=1))


def job_of(base: Path, config: TrainConfig) -> BranchJob:
    work = job(base, dataset("a", 1), dataset("b", 2))
    rows = (held_out_rows(), replace(held_out_rows(8), name="b"))
    return replace(work, held_out=rows if config.evaluate_steps else ())


def train_in(out: Path, base: Path, config: TrainConfig, ranks: Ranks) -> None:
    work = job_of(base, config)
    if ranks.leads:
        out.mkdir(exist_ok=True)
        train_branch(work, config, out, SilentProgress(), ranks=ranks)
    else:
        follow_branch(work, config, out, ranks)
    dist.barrier()


def run_case(folder: Path, name: str, ranks: Ranks) -> None:
    start, config = CASES[name]
    train_in(folder / f"{name}.whole", folder / start, config, ranks)
    divided = replace(config, shard="full")
    train_in(folder / f"{name}.divided", folder / start, divided, ranks)


def killed(folder: Path, ranks: Ranks) -> None:
    """The leader dies as it renames its third checkpoint."""
    rename = os.replace
    seen = 0

    def kills(source: Any, target: Any) -> None:
        nonlocal seen
        seen += str(target).endswith("resume.safetensors")
        if seen == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = kills  # type: ignore[assignment]
    start, config = RESUMED
    train_in(folder / "killed", folder / start, replace(config, shard="full"), ranks)


def resumed(folder: Path, ranks: Ranks) -> None:
    """Takes a copy of the killed run up; two processes also train one that was not killed."""
    start, config = RESUMED
    out = folder / f"resumed{ranks.size}"
    if ranks.leads:
        shutil.copytree(folder / "killed", out)
    dist.barrier()
    config = replace(config, shard="full")
    train_in(out, folder / start, config, ranks)
    if ranks.size == 2:
        train_in(folder / "unbroken", folder / start, config, ranks)


def in_backward(folder: Path, ranks: Ranks) -> None:
    """Updates in the backward pass, against the same steps behind it."""
    start, config = IN_BACKWARD
    behind = replace(config, update_in_backward=None)
    train_in(folder / "in_backward.whole", folder / start, behind, ranks)
    divided = replace(config, shard="full")
    train_in(folder / "in_backward.divided", folder / start, divided, ranks)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Parameter(torch.arange(6.0).view(3, 2))
        self.first_only = nn.Parameter(torch.ones(3, 2))
        self.never = nn.Parameter(torch.ones(5))

    def forward(self, rows: Tensor, is_first: bool) -> Tensor:
        weight = self.always * self.first_only if is_first else self.always
        return rows @ weight.T


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer()])
        self.outside = nn.Parameter(torch.tensor([2.0]))
        self.unread = nn.Parameter(torch.tensor([2.0, 3.0, 4.0]))

    def get_input_embeddings(self) -> None: ...

    def get_output_embeddings(self) -> None: ...


def unused(folder: Path, ranks: Ranks) -> None:
    """Parameters of which only one process, or none, has a gradient."""
    model = _Model()
    shards = divide_model(model, ranks)
    names = [name for name, _ in model.named_parameters()]
    rows = torch.ones(4, 2)

    def loss_of(model: Any) -> Tensor:
        out: Tensor = model.layers[0](rows, ranks.leads) * model.outside
        return out.sum()

    for _ in range(2):
        shards(loss_of).backward()
        assert shards.take_unused(names) == ["unread", "layers.0.never"]
    layer: Any = model.layers[0]
    first, count = rows_of(3, ranks.rank, ranks.size)
    # twice, of two processes: 4 rows of ones, times 2
    expected = {"always": torch.full((3, 2), 2 * 2 * 8.0)}
    expected["first_only"] = torch.arange(6.0).view(3, 2) * 2 * 8.0
    for name, whole in expected.items():
        gradient = own_part(getattr(layer, name).grad)
        assert torch.equal(gradient, whole[first : first + count]), (name, gradient)
    optimizer = MasterAdamW(model, CONFIG, None, ranks)
    if not ranks.leads:  # the leader has none of these rows
        own_part(layer.first_only.grad).fill_(float("nan"))
    try:
        optimizer.step(1e-3)
    except NonFiniteGradient as error:
        assert error.parameter == "layers.0.first_only", error
    else:
        raise AssertionError("a NaN of one process was taken")


def two_copies(folder: Path, ranks: Ranks) -> None:
    """Files that hold a tied weight twice: equal copies are one weight, others are refused."""
    for last, message in ((0.0, ""), (1.0, "lm_head.weight, whose stored values differ")):
        base = folder / f"copies{last}"
        if ranks.leads:
            make_model(base, shard="1GB")
            tensors = load_file(base / "model.safetensors")
            copy = tensors["model.embed_tokens.weight"].clone()
            copy[-1, -1] += last
            save_file({**tensors, "lm_head.weight": copy}, base / "model.safetensors")
        dist.barrier()
        model = make_hollow_model(str(base), "fp32")
        divide_model(model, ranks)
        try:
            fill_model(model, str(base), ranks)
            refused = ""
        except InputError as error:
            refused = str(error)
        assert refused.endswith(message) and bool(refused) == bool(message), refused


OTHERS: dict[str, Callable[[Path, Ranks], None]] = {
    "killed": killed,
    "resumed": resumed,
    "in_backward": in_backward,
    "unused": unused,
    "two_copies": two_copies,
}


def main(rank: int, size: int, folder: Path, *names: str) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(size), "RANK": str(rank)}
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{size}-{names[0]}"
    minute = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=minute)
    ranks = Ranks(rank, size)
    for name in names:
        if name in CASES:
            run_case(folder, name, ranks)
        else:
            OTHERS[name](folder, ranks)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may otherwise be torn down while they run


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
