"""A branch that trains an adapter: PEFT's own folder, exact resume, and the losses of PEFT."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support.checks import tree_bytes
from support.runs import MEASURED
from support.tiny import make_model, make_tokenizer
from support.training import CONFIG, dataset, job, train, train_in_two_parts
from torch.nn import functional as F

from merit_fast.errors import InputError
from merit_fast.model import load_model
from merit_fast.train.adapter.config import AdapterConfig

LORA = AdapterConfig("lora", rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
KINDS = {
    "lora": LORA,
    "rslora, all linear": AdapterConfig("rslora", rank=3),
    "dora": replace(LORA, kind="dora", targets=r"model\.layers\.\d\.self_attn\.[kv]_proj"),
    "dropout": replace(LORA, dropout=0.3, init="gaussian"),
    "whole norms": replace(LORA, modules_to_save=("norm",), init="orthogonal"),
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    base = tmp_path_factory.mktemp("untied") / "base"
    make_tokenizer(base)
    make_model(base, tie_word_embeddings=False)
    return base


def recipe(adapter, **changes):
    return replace(CONFIG, adapter=adapter, learning_rate=5e-3, **changes)


def losses_of(folder):
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_adapter_has_the_same_bytes_and_peft_loads_it(
    tiny_model, tmp_path, monkeypatch, name
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = recipe(KINDS[name], checkpoint_steps=2)
    rows = dataset("a", 0)
    train(tiny_model, tmp_path / "whole", config, rows)
    train_in_two_parts(job(tiny_model, rows), config, tmp_path / "broken", 5, monkeypatch)
    whole = tree_bytes(tmp_path / "whole", MEASURED)
    assert whole == tree_bytes(tmp_path / "broken", MEASURED)
    assert {"adapter_config.json", "adapter_model.safetensors", "branch.json"} <= whole.keys()
    assert not any(file.startswith("model") for file in whole)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "whole"))
    ours = load_model(str(tmp_path / "whole"), "fp32")
    ids = torch.arange(20)[None]
    plain = load_model(str(tiny_model), "fp32")
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain(ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_losses_are_those_of_peft_and_torch(untied, tmp_path, kernels):
    """Two epochs against PEFT's model, F.cross_entropy and torch's AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from merit_fast.train.schedule import learning_rate, num_steps, step_examples

    config = recipe(LORA, kernels=kernels, epochs=2)
    rows = dataset("a", 3, rows=6)
    train(untied, tmp_path / "out", config, rows)
    model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
    torch.manual_seed(config.seed)
    options = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(model, options)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)
    steps = num_steps(6, config)
    losses = []
    for step in range(steps):
        chosen = [rows.examples[i] for i in step_examples(step, 6, config)]
        pairs = [(torch.tensor(e.input_ids)[None].long(), torch.tensor(e.labels[1:]).long())
                 for e in chosen]  # fmt: skip
        count = sum(int((labels != -100).sum()) for _, labels in pairs)
        loss = (
            sum(
                F.cross_entropy(adapted(ids).logits[0, :-1], labels, reduction="sum")
                for ids, labels in pairs
            )
            / count
        )
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, config)
        optimizer.step()
    assert losses_of(tmp_path / "out") == pytest.approx(losses, rel=2e-4)


def test_bf16_weights_stay_and_the_adapter_trains_in_fp32(tmp_path):
    from safetensors.torch import load_file

    base = tmp_path / "base"
    make_tokenizer(base)
    make_model(base, dtype=torch.bfloat16)
    train(base, tmp_path / "out", recipe(LORA, dtype="bf16"), dataset("a", 0))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * 2 * 2
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


def test_the_merged_branch_is_the_adapter_on_its_base(tiny_model, tmp_path):
    rows = dataset("a", 0)
    train(tiny_model, tmp_path / "apart", recipe(LORA), rows)
    train(tiny_model, tmp_path / "merged", recipe(replace(LORA, save="merged")), rows)
    assert (tmp_path / "merged" / "config.json").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    apart = load_model(str(tmp_path / "apart"), "fp32").state_dict()
    merged = load_model(str(tmp_path / "merged"), "fp32").state_dict()
    assert apart.keys() == merged.keys()
    for name, tensor in apart.items():
        assert torch.equal(tensor, merged[name]), name


def test_branches_of_adapters_merge_into_an_adapter_and_onto_the_base(tiny_model, tmp_path):
    from merit_fast import merge_models

    paths = [tmp_path / "b0", tmp_path / "b1"]
    for seed, path in enumerate(paths):
        train(tiny_model, path, recipe(LORA), dataset("a", seed, rows=6 + 4 * seed))
    counts = [json.loads((p / "branch.json").read_text())["num_target_tokens"] for p in paths]
    merge_models(paths, "tokens", out=tmp_path / "joined")
    merge_models(paths, "tokens", base=tiny_model, out=tmp_path / "whole")
    joined = load_model(str(tmp_path / "joined"), "fp32", start=str(tiny_model)).state_dict()
    whole = load_model(str(tmp_path / "whole"), "fp32").state_dict()
    ends = [load_model(str(path), "fp32").state_dict() for path in paths]
    for name, tensor in whole.items():
        mean = sum(c * e[name].double() for c, e in zip(counts, ends, strict=True)) / sum(counts)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(joined[name], tensor, rtol=1e-4, atol=1e-5)


BAD = {
    "q_prj": (dict(targets=("q_proj", "q_prj")), "targets: 'q_prj' must match a module"),
    "expression": (dict(targets="layers.9.*"), "targets: 'layers.9.*' must match a module"),
    "not linear": (dict(targets=("mlp",)), "targets: must be linear layers, .*mlp is a LlamaMLP"),
    "tied head": (dict(targets=("lm_head",)), "lm_head must have weights of its own"),
    "tied embedding": (dict(modules_to_save=("embed_tokens",)), "must have weights of its own"),
    "saved": (dict(modules_to_save=("head",)), "modules_to_save: 'head' must match a module"),
    "both": (dict(modules_to_save=("q_proj",)), "modules_to_save: .*q_proj must not be a target"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_target_that_does_not_fit_is_named_before_training(tiny_model, tmp_path, name):
    from merit_fast.train.adapter.build import check_adapter

    changes, message = BAD[name]
    adapter = replace(LORA, **changes)
    with pytest.raises(InputError, match=message):
        check_adapter(tiny_model, adapter, None)
    with pytest.raises(InputError, match=message):
        train(tiny_model, tmp_path / "out", recipe(adapter), dataset("a", 0))


def test_the_check_counts_what_is_trained(tiny_model):
    from merit_fast.train.adapter.build import check_adapter

    assert check_adapter(tiny_model, LORA, None) == 2 * 4 * (72 + 72 + 100 + 72)


def test_frozen_modules_get_no_adapter(tiny_model, tmp_path):
    adapter = AdapterConfig("lora", rank=2)
    config = recipe(adapter, freeze=(r"layers\.0\.",))
    train(tiny_model, tmp_path / "out", config, dataset("a", 0))
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert named and all("layers.1" in name for name in named)
    with pytest.raises(InputError, match=r"layers\.0\..*must not be frozen by train.freeze"):
        train(tiny_model, tmp_path / "bad", replace(config, adapter=LORA), dataset("a", 0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(rank=8), "rank: must be absent without a kind"),
        (dict(kind="lora", rank=0), "rank: must be at least 1"),
        (dict(kind="lora", alpha=math.inf), "alpha: must be positive"),
        (dict(kind="lora", dropout=1.0), "dropout: must be from 0"),
        (dict(kind="lora", targets="("), "targets: must be a regular expression"),
        (dict(kind="lora", targets=()), "targets: must be all-linear"),
        (dict(kind="lora", init="orthogonal", rank=3), "rank: must be even"),
        (dict(kind="lora", base="4bit", save="merged"), "save: must be adapter"),
    ],
)
def test_options_that_do_not_fit_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        AdapterConfig(**values)
