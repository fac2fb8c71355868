"""Models whose layers stay in their files have the bytes of the model in memory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.sketch.exact_gradients import SKETCH, ragged_examples, summed_loss, tiny
from torch import nn

import merit_fast
from merit_fast.errors import InputError, MeritFastError
from merit_fast.model import load_model
from merit_fast.model.layered.stack import layers_of, parameters_of_layers
from merit_fast.model.layered.stream import LayerStream, stream_layer
from merit_fast.model.layered.unit import Unit
from merit_fast.sketch.gradients import GradientSketcher


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny model in a dtype; returns its folder."""

    def save(architecture, dtype=torch.float32, tied=False):
        tiny(architecture, tied).to(dtype).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def states_of(model, **options):
    """Bytes of the states after two batches, the first of which is checked against autograd."""
    options = {"check": "first", "uncovered": "autograd", "weight": "examples", **options}
    with GradientSketcher(model, SKETCH, **options) as sketcher:
        for _ in range(2):
            summed_loss(model, ragged_examples()).backward()
            sketcher.update(["a", "b", "a"])
    assert (sketcher.checked is None) == (options["check"] == "never")
    return {name: state.to_bytes() for name, state in sketcher.state.items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16-file", "fp32-file"])
def test_sketches_have_the_bytes_of_the_model_in_memory(saved, stored, dtype, tied):
    folder = saved("llama", stored, tied)
    whole = states_of(load_model(str(folder), dtype))
    assert states_of(merit_fast.load_layered(folder, dtype)) == whole


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "qwen2-moe", "neox", "gemma3", "opt"])
def test_other_forms_have_the_bytes_of_the_model_in_memory(saved, architecture):
    folder = saved(architecture)
    whole = states_of(load_model(str(folder), "fp32"))
    assert states_of(merit_fast.load_layered(folder, "fp32")) == whole


def test_dropout_draws_the_same_numbers_when_a_layer_runs_again(saved):
    folder = saved("gpt2")
    found = []
    for load in (load_model, merit_fast.load_layered):
        model = load(str(folder), "fp32").train()
        torch.manual_seed(3)
        found.append(states_of(model, check="never"))
        found.append(torch.rand(3))
    assert found[0] == found[2]
    assert torch.equal(found[1], found[3])  # the random state afterwards is the same too


def test_factors_of_kfac_and_sketches_by_them_have_the_same_bytes(saved, tmp_path):
    folder = saved("llama")
    found = []
    for load in (load_model, merit_fast.load_layered):
        model = load(str(folder), "fp32")
        with merit_fast.kfac_factors(model) as collector:
            summed_loss(model, ragged_examples()).backward()
            collector.update()
        factors = collector.factors()
        factors.save(tmp_path / "factors")
        found.append(((tmp_path / "factors").read_bytes(), states_of(model, factors=factors)))
    assert found[0] == found[1]


def test_sums_of_autocast_passes_are_the_same(saved):
    folder = saved("llama")
    found = []
    for load in (load_model, merit_fast.load_layered):
        model = load(str(folder), "fp32")
        with GradientSketcher(model, SKETCH) as sketcher:
            with torch.autocast("cpu", torch.bfloat16):
                loss = summed_loss(model, ragged_examples())
            loss.backward()
            found.append(sketcher.take())
    assert torch.equal(found[0], found[1])


def test_at_most_one_layer_is_in_memory_and_each_is_read_twice_a_batch(saved, monkeypatch):
    loaded = []
    in_memory = set()
    real_load = Unit.load
    real_free = Unit.free

    def load(unit):
        real_load(unit)
        loaded.append(unit.number)
        in_memory.add(unit.number)
        assert len(in_memory) == 1

    def free(unit):
        real_free(unit)
        in_memory.remove(unit.number)

    monkeypatch.setattr(Unit, "load", load)
    monkeypatch.setattr(Unit, "free", free)
    model = merit_fast.load_layered(saved("llama"), "fp32")
    with GradientSketcher(model, SKETCH, check="never", fingerprint="f") as sketcher:
        for _ in range(2):
            summed_loss(model, ragged_examples()).backward()
            sketcher.take()
    # The last layer stays between the passes; so does the first between the batches.
    assert loaded == [0, 1, 0, 1, 0]
    for name, parameter in model.named_parameters():
        held = not name.startswith("model.layers.1.")
        assert held == bool(parameter.isfinite().all())
        assert held or parameter.untyped_storage().nbytes() == parameter.element_size()


def test_the_model_is_never_silently_wrong(saved):
    folder = saved("llama")
    model = merit_fast.load_layered(folder, "fp32")
    parameter = model.model.layers[1].mlp.up_proj.weight
    assert parameter.isnan().all()  # what reads a layer's values at another time cannot miss it
    with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
        parameter.add_(1)
    with pytest.raises(MeritFastError, match="weights are in its files"):
        model.save_pretrained(folder.parent / "copy")


def test_a_layer_that_computes_something_else_when_it_runs_again_is_an_error(saved):
    model = merit_fast.load_layered(saved("llama"), "fp32")
    runs = iter([1.0, 1.0, 2.0])
    kind = type(model.model.layers[1].mlp)
    plain = kind.forward
    layer = model.model.layers[1]
    layer.mlp.forward = lambda x: next(runs) * plain(layer.mlp, x)
    with torch.no_grad():
        summed_loss(model, ragged_examples())
    loss = summed_loss(model, ragged_examples())
    with pytest.raises(MeritFastError, match=r"model\.layers\.1 must compute the same"):
        loss.backward()


def test_a_cache_is_refused(saved):
    model = merit_fast.load_layered(saved("llama"), "fp32")
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids)  # the config says that none is wanted
    with pytest.raises(MeritFastError, match="use_cache=False"):
        model(input_ids=ids, use_cache=True)


def change(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_files_that_do_not_make_the_model_are_refused_in_words(saved):
    folder = saved("llama")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(InputError, match="quantization_config: must be absent"):
        merit_fast.load_layered(folder)
    change(folder, quantization_config=None)
    save_file({k: v for k, v in tensors.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(InputError, match=rf"{name}: must be in the model's files, is absent"):
        merit_fast.load_layered(folder)
    save_file(tensors | {name: tensors[name][:5].clone()}, file, {"format": "pt"})
    with pytest.raises(InputError, match=rf"{name}: must be \[52, 36\] .* found \[5, 36\]"):
        merit_fast.load_layered(folder)
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"model\.safetensors: is not a safetensors file"):
        merit_fast.load_layered(folder)
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(InputError, match="is an adapter"):
        merit_fast.load_layered(folder)


def test_a_layer_inside_another_is_refused():
    units = [Unit(name, i, {}, {}, nn.Module()) for i, name in enumerate("ab")]
    stream = LayerStream(units)

    def outer(x):
        return stream.call(units[1], nn.Identity(), (x,), {})

    with pytest.raises(MeritFastError, match="layer b runs inside another layer"):
        stream.call(units[0], outer, (torch.ones(2),), {})


def toy():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)]
    layers[1][0].weight = layers[0][0].weight
    model = nn.Module()
    model.stack = nn.ModuleList([layers[0], layers[1], layers[2], layers[2]])
    model.head = nn.Linear(5, 5)
    model.head.bias = layers[2][0].bias
    return model


def test_a_parameter_of_two_owners_stays_in_memory_and_a_shared_layer_is_one():
    model = toy()
    layers = layers_of(model)
    assert list(layers) == ["stack.0", "stack.1", "stack.2"]
    owned = {name: list(of_layer) for name, of_layer in parameters_of_layers(model, layers).items()}
    assert owned == {
        "stack.0": ["stack.0.0.bias"],
        "stack.1": ["stack.1.0.bias"],
        "stack.2": ["stack.2.0.weight"],
    }


def test_a_layer_that_is_called_twice_has_the_gradients_of_an_ordinary_one():
    plain, streamed = toy(), toy()
    layers = layers_of(streamed)
    stream = LayerStream([Unit(name, i, {}, {}, streamed) for i, name in enumerate(layers)])
    for unit in stream.units:
        stream_layer(layers[unit.name], stream, unit)
    x = torch.randn(4, 5)
    for model in (plain, streamed):
        y = x
        for layer in model.stack:
            y = layer(y)
        model.head(y).square().sum().backward()
    gradients = [[p.grad for p in model.parameters()] for model in (plain, streamed)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
