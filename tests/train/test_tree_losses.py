"""A row that shares its beginnings has the losses and gradients of its texts, in every stage."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.architectures import CASES, TEXT, VOCABULARY, make
from support.training import CONFIG, train

from merit_fast.data import Dataset, Example, collate, count_target_tokens, pack
from merit_fast.data.tree import build, expand
from merit_fast.evaluate.losses import score_rows
from merit_fast.model import fit_trees, load_model, reads_trees, target_losses
from merit_fast.patch.model import patch_model
from merit_fast.progress import SilentProgress
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.mixture.stage import sketch_mixture
from merit_fast.train.loss import batch_loss

# name -> (class, config class, options); layers with windows or chunks shorter than the texts
MORE = {
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        dict(sliding_window=6, num_local_experts=4, num_experts_per_tok=2),
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        dict(attention_chunk_size=8, intermediate_size_mlp=24, num_local_experts=2),
    ),
    "mistral window": ("MistralForCausalLM", "MistralConfig", dict(sliding_window=6)),
    "phi3 window": ("Phi3ForCausalLM", "Phi3Config", dict(sliding_window=6)),
}
# recurrent layers, convolutions and positions counted from a mask see other branches
UNABLE = {
    "mamba": ("MambaForCausalLM", "MambaConfig", dict(state_size=4)),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", dict(layer_types=["conv", "full_attention"])),
    "bloom": ("BloomForCausalLM", "BloomConfig", {}),
}


def make_any(name):
    if name in CASES:
        return make(name).eval()
    import transformers

    model_class, config_class, options = {**MORE, **UNABLE}[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**TEXT, **options})
    return getattr(transformers, model_class)(config).eval()


def conversation(generator, turns, stem, most=VOCABULARY):
    """Texts in which each answer follows its thinking, and earlier turns show no thinking."""

    def draw(count):
        return generator.integers(3, most, count).astype(np.int32)

    texts = []
    history = draw(stem)
    for _ in range(turns):
        thinking, answer, question = draw(4), draw(3), draw(2)
        ids = np.concatenate([history, thinking, answer])
        labels = ids.copy()
        labels[: len(history)] = -100
        texts.append((ids, labels))
        history = np.concatenate([history, answer, question])
    return build(texts)


def trees(most=VOCABULARY):
    generator = np.random.default_rng(0)
    plain = generator.integers(3, most, 11).astype(np.int32)
    return [
        conversation(generator, 3, 9, most),
        Example(plain, np.where(np.arange(11) < 6, -100, plain).astype(np.int32)),
        conversation(generator, 2, 4, most),
    ]


def sums(losses, count):
    return torch.zeros(count).index_add(0, losses.example, losses.loss.detach())


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_a_tree_has_the_losses_of_its_texts_padded_and_packed(name):
    model = make_any(name)
    examples = trees()
    assert reads_trees(model, [e for e in examples if e.tree is not None])
    with torch.no_grad():
        apart = [
            sum(target_losses(model, collate([text], [0], 0)).loss.sum() for text in expand(e))
            for e in examples
        ]
        padded = sums(target_losses(model, collate(examples, [0] * 3, 0)), 3)
        packed = sums(target_losses(model, pack(examples, [0] * 3)), 3)
    torch.testing.assert_close(padded, torch.stack(apart), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(packed, torch.stack(apart), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", UNABLE)
def test_a_model_that_sees_other_branches_gets_the_texts(name):
    model = make_any(name)
    examples = trees()
    texts, numbers = fit_trees(model, examples)
    assert [text.tree for text in texts] == [None] * 6
    assert numbers == [0, 0, 0, 1, 2, 2]
    scores = score_rows(model, [examples], 0, 4)
    assert scores.tokens.tolist() == [count_target_tokens(e.labels) for e in examples]
    apart = [score_rows(model, [expand(example)], 0, 1).loss.sum().item() for example in examples]
    np.testing.assert_allclose(scores.loss.numpy(), apart, rtol=1e-4)


def test_a_leak_between_branches_is_found():
    model = make("llama").eval()
    forward = model.forward

    def causal(attention_mask=None, **inputs):  # a model that ignores the mask of branches
        return forward(attention_mask=None, **inputs)

    model.forward = causal
    causal.__signature__ = inspect.signature(forward)
    assert not reads_trees(model, [conversation(np.random.default_rng(1), 3, 5)])


def test_rows_of_trees_count_as_one_and_share_no_cache():
    model = make("qwen3").eval()
    examples = trees()
    scores = score_rows(model, [examples[:2], examples[2:]], 0, 2)
    apart = [score_rows(model, [expand(e)], 0, 1) for e in examples]
    np.testing.assert_allclose(scores.loss.numpy(), [s.loss.sum() for s in apart], rtol=1e-5)
    assert scores.exact.tolist() == [float(s.exact.all()) for s in apart]
    with pytest.raises(ValueError, match="share"):
        score_rows(model, [examples], 0, 2, share=True)


@pytest.mark.parametrize("is_read", [True, False])
def test_the_gradient_of_a_tree_is_one_sketch(tiny_model, tmp_path, monkeypatch, is_read):
    examples = trees(384)
    monkeypatch.setattr("merit_fast.model.tree_trial.reads_trees", lambda model, found: is_read)
    config = SketchConfig(
        proj_dim=4096, dtype="fp32", examples=3, batch_size=3, blocks=2, weight="examples"
    )
    sketch_mixture(
        str(tiny_model),
        "model",
        [Dataset("d", tuple(examples))],
        0,
        config,
        tmp_path,
        SilentProgress(),
    )
    from safetensors.torch import load_file

    found = load_file(tmp_path / "d.safetensors")
    expected = reference_sums(tiny_model, examples, config)
    name = max(found, key=lambda key: found[key].numel())
    torch.testing.assert_close(
        found[name].sum(0).float().flatten(), expected.float(), rtol=1e-3, atol=1e-4
    )


def reference_sums(path, examples, config):
    """Sum over examples of the sketched gradient of the mean loss, from the texts one by one."""
    from merit_fast.kernels.sketch import CountSketch
    from merit_fast.sketch.gradients import GradientSketcher

    model = load_model(str(path), "fp32")
    total = torch.zeros(config.proj_dim)
    sketch = CountSketch(config.proj_dim, config.seed)
    with GradientSketcher(model, sketch, check="never") as sketcher:  # parts of an example's mean
        for example in examples:
            for text in expand(example):
                losses = target_losses(model, collate([text], [0], 0)).loss
                (losses.sum() / count_target_tokens(example.labels)).backward()
                total += sketcher.take()[0]
    return total


@pytest.mark.parametrize("packing", [False, True])
def test_training_on_trees_equals_training_on_their_texts(
    tiny_model, tmp_path, monkeypatch, packing
):
    config = replace(CONFIG, packing=packing, kernels="eager")
    rows = Dataset("d", tuple(trees(384) * 4))
    losses = {}
    manifests = {}
    for is_read in (True, False):
        if not is_read:
            monkeypatch.setattr("merit_fast.train.stage.reads_trees", lambda model, found: False)
        folder = tmp_path / str(is_read)
        manifests[is_read] = train(tiny_model, folder, config, rows)
        losses[is_read] = json.loads((folder / "losses.json").read_text())
    assert manifests[True].num_examples == manifests[False].num_examples
    assert manifests[True].num_target_tokens == manifests[False].num_target_tokens
    assert manifests[True].num_tokens < manifests[False].num_tokens
    if not packing:  # packed rows of expanded trees hold other examples
        np.testing.assert_allclose(losses[True], losses[False], rtol=2e-4)


def test_gradients_through_the_patched_head_are_those_of_the_texts(tiny_model):
    model = load_model(str(tiny_model), "fp32")
    patch_model(model, "auto")
    example = trees(384)[0]
    targets = count_target_tokens(example.labels)
    gradients = []
    for texts in ([example], expand(example)):
        model.zero_grad()
        batch_loss(model, collate(texts, [0] * len(texts), 0), targets).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_a_tree_with_images_is_no_batch():
    example = replace(trees()[0], media=object())
    with pytest.raises(ValueError, match="a tree must be text"):
        collate([example], [0], 0)
