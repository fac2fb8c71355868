"""One rank of two: patch_model before and after fully_shard, against one process without either.

python tests/patch/sharded.py RANK MEETING_FILE
"""

import datetime
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # of `support`

import torch
import torch.distributed as dist
from support.architectures import inputs, make
from torch.distributed.fsdp import FSDPModule, fully_shard

from merit_fast import patch_model
from merit_fast.patch.classes import swap_of

EXPECTED = {"rms_norm": 5, "add_rms_norm": 2, "swiglu": 2, "rope": 2, "head": 1}


def check(order: str, expected_loss: torch.Tensor, gradients: dict[str, Any]) -> None:
    model: Any = make("llama")
    batch = inputs()
    if order == "before":
        patch = patch_model(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    if order != "before":
        patch = patch_model(model)
    if order == "twice":
        patch = patch_model(model)
    assert dict(patch.replaced) == EXPECTED, (order, str(patch))
    assert swap_of(model) is not None
    output = model(**batch)
    assert output.logits is None, order
    assert abs(output.loss.item() / expected_loss.item() - 1) < 1e-5, order
    output.loss.backward()
    for name, parameter in model.named_parameters():
        whole = parameter.grad.full_tensor()
        error = (whole - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-5, (order, name, error)
    patch.restore()
    assert not any(swap_of(module) for module in model.modules()), order
    assert FSDPModule in type(model).__mro__ and type(model).__name__ == "FSDPLlamaForCausalLM"
    assert model(**batch).logits is not None, order
    assert dict(patch_model(model).replaced) == EXPECTED
    assert model(**batch).logits is None


def main() -> None:
    rank, meeting = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )
    plain = make("llama")
    output = plain(**inputs())
    output.loss.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for order in ("before", "after", "twice"):
        check(order, output.loss.detach(), gradients)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
