"""Models of whose parameters a process has all values only while their modules run."""

import pytest
import torch
import torch.distributed as dist
from support.sketch.exact_gradients import SKETCH, hook_sketches, ragged_examples, tiny
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import merit_fast
from merit_fast.errors import MeritFastError
from merit_fast.sketch.gradients import GradientSketcher

IDS = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mesh():
    """Devices of a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def summed(model):
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1].log_softmax(-1)
    return -logits.gather(-1, IDS[:, 1:, None]).sum()


def sketched(model, **options):
    """Sketches of two passes, of which the first is checked, and the model's identity."""
    with GradientSketcher(model, SKETCH, **options) as sketcher:
        for _ in range(2):
            summed(model).backward()
            sketches = sketcher.take()
        assert sketcher.checked.sum_error < 2e-6
        return sketches, sketcher.identity


def test_what_no_process_can_sketch_is_refused_by_the_parameters_name(mesh):
    split = tiny("llama")
    parallelize_module(split.model.layers[0], mesh, {"input_layernorm": SequenceParallel()})
    with pytest.raises(
        MeritFastError, match=r"layers\.0\.input_layernorm\.weight .* DTensor of LlamaRMSNorm"
    ):
        merit_fast.sketch_gradients(split)
    with pytest.raises(MeritFastError, match=r"is a DTensor .* load_layered"):
        merit_fast.kfac_factors(split)
    tied = tiny("llama", tied=True)
    parallelize_module(tied, mesh, {"lm_head": ColwiseParallel()})
    with pytest.raises(MeritFastError, match="tensor parallelism has made two of it"):
        merit_fast.sketch_gradients(tied)
    flat = FullyShardedDataParallel(
        tiny("llama"), device_id=torch.device("cpu"), use_orig_params=True
    )
    with pytest.raises(MeritFastError, match=r"embed_tokens\.weight .* \(FSDP1\)"):
        merit_fast.sketch_gradients(flat)
    emptied = tiny("llama")
    emptied.lm_head.weight.ds_id = 0
    with pytest.raises(MeritFastError, match=r"lm_head\.weight .* ZeRO-3"):
        merit_fast.sketch_gradients(emptied)
    with torch.device("meta"):
        hollow = tiny("llama")
    with pytest.raises(MeritFastError, match=r"embed_tokens\.weight .* has no values"):
        merit_fast.sketch_gradients(hollow)


def test_a_module_inside_of_the_divided_one_is_refused_when_it_runs(mesh):
    model = tiny("llama")
    fully_shard(model, mesh=mesh)
    with GradientSketcher(model, SKETCH), pytest.raises(MeritFastError, match="must be whole"):
        model.model(input_ids=IDS)


@pytest.mark.parametrize("reentrant", [False, True, None])
def test_fsdp2_with_checkpointing_gives_the_bits_of_the_whole_model(mesh, reentrant):
    rows = []
    for is_divided in (False, True):
        model = tiny("llama", tied=True)
        if reentrant is not None:
            model.train()
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        for layer in model.model.layers if is_divided else ():
            fully_shard(layer, mesh=mesh)
        if is_divided:
            fully_shard(model, mesh=mesh)
        rows.append(hook_sketches(model, ragged_examples()))
    assert torch.equal(*rows)


def test_fsdp2_trains_afterwards_as_if_it_had_not_been_sketched(mesh):
    gradients = []
    for is_sketched in (False, True):
        model = tiny("llama")
        mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        fully_shard(model, mesh=mesh, mp_policy=mixed)
        for check in ("never", "always") if is_sketched else ():
            with GradientSketcher(model, SKETCH, check=check) as sketcher:
                summed(model).backward()
                sketcher.take()
        summed(model).backward()
        gradients.append([parameter.grad.full_tensor() for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_factors_and_scales_of_a_divided_model_are_those_of_the_whole(mesh):
    rows = []
    for is_divided in (False, True):
        model = tiny("llama")
        if is_divided:
            fully_shard(model, mesh=mesh)
        with merit_fast.kfac_factors(model) as collector:
            summed(model).backward()
            collector.update()
        options = {"normalize": "kfac", "factors": collector.factors()}
        with merit_fast.sketch_gradients(model, 4096, **options) as sketcher:
            summed(model).backward()
            rows.append(sketcher.take())
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(3.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": parameter.detach().square() + 1e-6,
            }
        options = {"normalize": "adam", "optimizer": optimizer}
        with merit_fast.sketch_gradients(model, 4096, **options) as sketcher:
            summed(model).backward()
            rows.append(sketcher.take())
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1], rows[3])


def offloaded(kind, model, folder):
    accelerate = pytest.importorskip("accelerate")
    cpu = torch.device("cpu")
    if kind == "memory":
        return accelerate.cpu_offload(model, execution_device=cpu)
    if kind == "disk":
        return accelerate.disk_offload(model, folder, execution_device=cpu)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("kind", ["memory", "disk", "device_map"])
@pytest.mark.parametrize("architecture, tied", [("llama", True), ("mixtral", False)])
def test_offloaded_weights_give_the_bits_and_the_identity_of_the_model_in_memory(
    kind, architecture, tied, tmp_path
):
    whole = sketched(tiny(architecture, tied))
    model = offloaded(kind, tiny(architecture, tied), tmp_path)
    for _ in range(2):  # hooks put new empty parameters into the modules
        sketches, identity = sketched(model)
        assert torch.equal(sketches, whole[0])
        assert identity == whole[1]
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_offloaded_parameters_of_equal_values_are_refused_where_nothing_tells_if_they_are_one():
    accelerate = pytest.importorskip("accelerate")
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5))
    model[1].weight = model[0].weight
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(MeritFastError, match=r"0\.weight and 1\.weight have equal values"):
        merit_fast.sketch_gradients(model)
