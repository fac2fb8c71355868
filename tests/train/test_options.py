"""Options of the recipe that change cost, not results; the routers' loss of experts."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.checks import tree_bytes
from support.runs import MEASURED
from support.tiny import make_tokenizer
from support.training import CONFIG, dataset, job, train, train_in_two_parts, weights

import merit_fast.train.adapter.build as build
from merit_fast.data import collate
from merit_fast.errors import InputError
from merit_fast.evaluate.retention import greedy_answers
from merit_fast.model import load_model, model_inputs, without_router_logits
from merit_fast.train.adapter.config import AdapterConfig
from merit_fast.train.optimizer import MasterAdamW
from merit_fast.train.prepare import prepare_model
from merit_fast.train.resume import Position
from merit_fast.train.step import train_step

ADAPTER = AdapterConfig("lora", rank=4, targets=("q_proj", "down_proj"), dropout=0.2)


def losses_of(folder):
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("adapter", [AdapterConfig(), ADAPTER])
def test_checkpointing_changes_no_bit(tiny_model, tmp_path, adapter):
    config = replace(CONFIG, adapter=adapter)
    for name, is_on in (("plain", False), ("recomputed", True)):
        changed = replace(config, gradient_checkpointing=is_on)
        train(tiny_model, tmp_path / name, changed, dataset("a", 0))
    plain, recomputed = (tree_bytes(tmp_path / n, MEASURED) for n in ("plain", "recomputed"))
    assert plain == recomputed


def test_checkpointing_computes_layers_again(tiny_model):
    calls = {}
    for is_on in (False, True):
        trained = prepare_model(
            str(tiny_model), replace(CONFIG, gradient_checkpointing=is_on, kernels="eager")
        )
        count = 0

        def counts(*_):
            nonlocal count
            count += 1

        trained.model.model.layers[0].mlp.register_forward_pre_hook(counts)
        batch = collate(dataset("a", 0).examples[:2], [0, 0], 0)
        optimizer = MasterAdamW(trained.model, CONFIG)
        train_step(trained, optimizer, [batch], ("a",), 4, CONFIG, Position())
        calls[is_on] = count
    assert calls == {False: 1, True: 2}


def test_a_model_without_checkpointing_is_refused(tiny_model, monkeypatch):
    from transformers import LlamaPreTrainedModel

    monkeypatch.setattr(LlamaPreTrainedModel, "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match="gradient_checkpointing: must be false, LlamaForCausalLM"):
        prepare_model(str(tiny_model), replace(CONFIG, gradient_checkpointing=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_the_8_bit_optimizer_stays_near_the_other_and_resumes_to_the_bit(
    tiny_model, tmp_path, monkeypatch, dtype, kernels
):
    config = replace(
        CONFIG, optimizer="adamw-8bit", dtype=dtype, kernels=kernels, checkpoint_steps=2, epochs=3
    )
    rows = dataset("a", 0)
    train(tiny_model, tmp_path / "plain", replace(config, optimizer="adamw"), rows)
    train(tiny_model, tmp_path / "small", config, rows)
    assert losses_of(tmp_path / "small") == pytest.approx(losses_of(tmp_path / "plain"), rel=2e-2)
    assert losses_of(tmp_path / "small") != losses_of(tmp_path / "plain")
    train_in_two_parts(job(tiny_model, rows), config, tmp_path / "broken", 5, monkeypatch)
    assert tree_bytes(tmp_path / "small", MEASURED) == tree_bytes(tmp_path / "broken", MEASURED)


@pytest.mark.parametrize(("optimizer", "most"), [("adamw", 12.1), ("adamw-8bit", 3.2)])
def test_bytes_of_the_state_for_each_bf16_parameter(optimizer, most):
    """Next to the weight's two bytes: master and moments."""
    weight = torch.nn.Parameter(torch.randn(256, 256).bfloat16())
    model = torch.nn.Module()
    model.register_parameter("w", weight)
    adamw = MasterAdamW(model, replace(CONFIG, optimizer=optimizer))
    weight.grad = torch.ones_like(weight)
    adamw.step(1e-3)
    state = {name: t for name, t in adamw.state().items() if t.data_ptr() != weight.data_ptr()}
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert most - 0.2 < total / weight.numel() < most


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_a_weight_that_is_not_row_major_resumes_to_the_bit(optimizer):
    """The file of a checkpoint holds every tensor in row-major order."""

    def made():
        values = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
        model = torch.nn.Module()
        model.register_parameter("w", torch.nn.Parameter(values.t()))
        return model, MasterAdamW(model, replace(CONFIG, optimizer=optimizer))

    def step(model, adamw, seed):
        numbers = torch.Generator().manual_seed(seed)
        model.w.grad = torch.randn(300, 6, generator=numbers).bfloat16()
        adamw.step(1e-2)

    (whole, unbroken), (resumed, other) = made(), made()
    step(whole, unbroken, 1)
    other.load_state({name: t.clone().contiguous() for name, t in unbroken.state().items()})
    for model, adamw in ((whole, unbroken), (resumed, other)):
        step(model, adamw, 2)
    ours, theirs = other.state(), unbroken.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize("mode", ["two-pass", "previous"])
def test_updates_in_the_backward_pass_resume_to_the_bit(
    tiny_model, tmp_path, monkeypatch, kernels, mode
):
    """Two passes clip as one step does; the norm of the step before clips nearly so."""
    config = replace(
        CONFIG,
        kernels=kernels,
        update_in_backward=mode,
        checkpoint_steps=2,
        gradient_checkpointing=True,
    )
    rows = dataset("a", 0)
    plain_config = replace(config, update_in_backward=None)
    train(tiny_model, tmp_path / "plain", plain_config, rows)
    train(tiny_model, tmp_path / "inside", config, rows)
    rel = 1e-5 if mode == "two-pass" else 2e-2
    assert losses_of(tmp_path / "inside") == pytest.approx(losses_of(tmp_path / "plain"), rel=rel)
    train_in_two_parts(job(tiny_model, rows), config, tmp_path / "broken", 5, monkeypatch)
    assert tree_bytes(tmp_path / "inside", MEASURED) == tree_bytes(tmp_path / "broken", MEASURED)


def test_updates_in_the_backward_pass_leave_no_gradient(tiny_model):
    config = replace(CONFIG, update_in_backward="previous")
    trained = prepare_model(str(tiny_model), config)
    optimizer = MasterAdamW(trained.model, config)
    batch = collate(dataset("a", 0).examples[:2], [0, 0], 0)
    for step in range(2):
        most = 0

        def counts(parameter):
            nonlocal most
            alive = [p for p in optimizer.parameters if type(p.grad) is torch.Tensor]
            most = max(most, len(alive))

        handles = [p.register_post_accumulate_grad_hook(counts) for p in optimizer.parameters]
        train_step(trained, optimizer, [batch], ("a",), 4, config, Position(step=step))
        for handle in handles:
            handle.remove()
        if step:  # the first step has no norm of a step before
            assert most <= 2


@pytest.mark.parametrize("changes", [dict(packing=True), dict(accumulation=2)])
def test_updates_in_the_backward_pass_need_one_batch_a_step(changes):
    with pytest.raises(InputError, match=f"{next(iter(changes))}: must be absent with update_in"):
        replace(CONFIG, update_in_backward="previous", **changes)


# ---- mixtures of experts
@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    from transformers import MixtralConfig, MixtralForCausalLM

    base = tmp_path_factory.mktemp("experts")
    make_tokenizer(base)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=400, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
        max_position_embeddings=256, output_router_logits=True, router_aux_loss_coef=0.5,
        eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(base)
    return base


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_experts_train_with_transformers_own_router_loss(experts, kernels):
    trained = prepare_model(str(experts), replace(CONFIG, kernels=kernels))
    assert trained.router_factor == 0.5
    batch = collate(dataset("a", 0).examples[:5], [0] * 5, 0)
    theirs = load_model(str(experts), "fp32").train()
    inputs, _ = model_inputs(theirs, batch)
    inputs.pop("logits_to_keep")
    output = theirs(**inputs, labels=batch.labels)
    output.loss.backward()
    seen = {}

    class Keeps(MasterAdamW):
        def step(self, learning_rate):
            seen.update(
                {n: p.grad.clone() for n, p in zip(self.names, self.parameters, strict=True)}
            )
            return super().step(learning_rate)

    optimizer = Keeps(trained.model, CONFIG)
    _, record = train_step(trained, optimizer, [batch], ("a",), 4, CONFIG, Position())
    cross_entropy = float((output.loss - 0.5 * output.aux_loss).detach())
    assert record.sums.mean == pytest.approx(cross_entropy, rel=1e-5)
    gates = 0
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-3, atol=1e-6)
        gates += ".gate." in name
    assert gates == 2


def test_a_router_loss_without_a_coefficient_is_refused(tiny_model):
    from merit_fast.train.loss import router_coefficient

    assert router_coefficient(load_model(str(tiny_model), "fp32")) == 0.0
    text = SimpleNamespace(output_router_logits=True)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    with pytest.raises(InputError, match="SimpleNamespace has no router_aux_loss_coef"):
        router_coefficient(model)


def test_a_padded_batch_of_experts_answers_with_the_router_logits_off(experts, tmp_path):
    train(experts, tmp_path / "out", CONFIG, dataset("a", 0))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["output_router_logits"] is True
    model = load_model(str(tmp_path / "out"), "fp32")
    without_router_logits(model)
    answers = greedy_answers(model, [1], [[5, 6, 7], [8]], 1, max_new_tokens=3)
    assert [len(answer) > 0 for answer in answers] == [True, True]


# ---- four bits
def test_four_bits_need_their_package(tiny_model, tmp_path, monkeypatch):
    plain = build.importlib.util.find_spec

    def absent(name, *arguments):
        return None if name == "bitsandbytes" else plain(name, *arguments)

    monkeypatch.setattr(build.importlib.util, "find_spec", absent)
    config = replace(CONFIG, adapter=replace(ADAPTER, base="4bit"))
    with pytest.raises(InputError, match="adapter.base: 4bit needs the package bitsandbytes"):
        train(tiny_model, tmp_path / "out", config, dataset("a", 0))


def test_a_frozen_base_of_four_bits_trains_an_adapter(tiny_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = replace(CONFIG, adapter=AdapterConfig("lora", rank=4, base="4bit"))
    trained = prepare_model(str(tiny_model), config)
    kinds = {type(module).__name__ for module in trained.model.modules()}
    assert "Linear4bit" in kinds
    train(tiny_model, tmp_path / "out", config, dataset("a", 0))
    assert not weights(tmp_path / "out")
    plain = load_model(str(tiny_model), "fp32").state_dict()
    moved = load_model(str(tmp_path / "out"), "fp32").state_dict()
    assert any(not torch.equal(plain[name], moved[name]) for name in plain)
