"""Models of which a process lacks a part are refused before anything runs."""

import pytest
import torch
import torch.distributed as dist
from support.sketch.exact_gradients import SKETCH, hook_sketches, ragged_examples, tiny
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import merit_fast
from merit_fast.errors import MeritFastError
from merit_fast.sketch.gradients import GradientSketcher


@pytest.fixture
def mesh():
    """Devices of a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp2_and_tensor_parallelism_are_refused_by_the_parameters_name(mesh):
    sharded = tiny("llama")
    fully_shard(sharded.model.layers[1], mesh=mesh)
    with pytest.raises(
        MeritFastError, match=r"model\.layers\.1\.\S+ must be whole .* is a DTensor"
    ):
        merit_fast.sketch_gradients(sharded)
    with pytest.raises(MeritFastError, match=r"is a DTensor .* load_layered"):
        merit_fast.kfac_factors(sharded)
    split = tiny("llama")
    parallelize_module(split.model.layers[0].mlp, mesh, {"up_proj": ColwiseParallel()})
    with pytest.raises(MeritFastError, match=r"layers\.0\.mlp\.up_proj\.weight must be whole"):
        merit_fast.sketch_gradients(split)
    # What the process does have is sketched.
    with GradientSketcher(split, SKETCH, {"lm_head.weight": split.lm_head.weight}):
        pass


def test_weights_that_accelerate_offloads_are_refused_and_a_device_map_without_them_works():
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama")
    whole = hook_sketches(model, ragged_examples())
    placed = accelerate.dispatch_model(tiny("llama"), {"": "cpu"}, main_device="cpu")
    assert torch.equal(hook_sketches(placed, ragged_examples()), whole)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        MeritFastError, match=r"model\.embed_tokens\.weight .* offloaded by accelerate"
    ):
        merit_fast.sketch_gradients(model)
