"""Whole models with byte-level BPE and Llama tokenizers: loaded, encoded, in shares and stores."""

import json

import pytest
import torch
from support.merge.merges import write
from support.merge.vocabulary.models import EMBEDDING, HEAD, OWN, make_model, merged_rows
from support.tiny import make_model as make_llama
from support.tiny import make_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer

from merit_fast.integrations.mergekit.recipe import merge_recipe, read_mergekit
from merit_fast.merge import merge_models
from merit_fast.merge.read.remote import as_location
from merit_fast.progress import SilentProgress

UNION = {"source": "union", "pad_to_multiple_of": 64}
TEXT = "Give the capital. France Paris <|im_start|>user\nmice<|im_end|>"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Tied Llamas with byte-level BPE; the second has two more tokens and no padding."""
    root = tmp_path_factory.mktemp("pair")
    first = make_tokenizer(root / "first")
    make_llama(root / "first", vocab_size=len(first) + 7, seed=0)
    second = make_tokenizer(root / "second")
    second.add_tokens(["<tool>", "<|x|>"], special_tokens=True)
    second.save_pretrained(root / "second")
    make_llama(root / "second", vocab_size=len(second), seed=1)
    return root / "first", root / "second"


def weights(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_text_becomes_the_tokens_of_the_first_model_and_new_ones(pair, tmp_path):
    merge_models(pair, out=tmp_path / "out", tokenizer=UNION)
    out, first = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", pair[0]))
    assert out(TEXT).input_ids == first(TEXT).input_ids
    assert out("<tool> a").input_ids[0] == len(first) == out.get_vocab()["<tool>"]
    chat = [{"role": "user", "content": "x"}]
    assert out.apply_chat_template(chat) == first.apply_chat_template(chat)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 448 == len(model.get_input_embeddings().weight)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(**out(TEXT, return_tensors="pt")).logits.shape[-1] == 448


def test_shares_threads_and_chunks_change_no_byte(pair, tmp_path):
    merge_models(pair, out=tmp_path / "out", tokenizer=UNION)
    truth = weights(tmp_path / "out")
    for number in (1, 2):
        merge_models(pair, out=tmp_path / "shared", tokenizer=UNION, share=(number, 2))
    assert weights(tmp_path / "shared") == truth
    for threads, chunk in ((1, 4), (3, 64)):
        options = {"threads": threads, "chunk_kib": chunk}
        merge_models(pair, out=tmp_path / "other", tokenizer=UNION, **options)
        assert weights(tmp_path / "other") == truth


def test_models_in_a_store_give_the_same_bytes(pair, tmp_path):
    from support.merge.s3_server import put_tree

    place = as_location("memory://vocabularies")
    remote = [place / path.name for path in pair]
    for path, target in zip(pair, remote, strict=True):
        put_tree(path, target)
    merge_models(pair, out=tmp_path / "local", tokenizer=UNION, chat_template="chatml")
    merge_models(remote, out=tmp_path / "out", tokenizer=UNION, chat_template="chatml")
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def make_llama_model(folder, added, rows):
    """As mergekit's tests make them: a BPE without merges of 64 tokens, and added ones."""
    own = {text: number for number, text in enumerate(OWN)}
    own |= {f"_tok_{number}": number for number in range(len(own), 64)}
    tokenizer = LlamaTokenizer(tokenizer_object=Tokenizer(models.BPE(own, [])))
    tokenizer.add_tokens(list(added))
    make_llama(folder, vocab_size=rows, seed=rows, pad_token_id=None)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    root = tmp_path_factory.mktemp("llamas")
    return [
        make_llama_model(root / "base", (), 64),
        make_llama_model(root / "padded", ("<u0>", "<u1>", "<u2>"), 64),
        make_llama_model(root / "chat", ("<|im_start|>", "<|im_end|>"), 66),
    ]


@pytest.mark.parametrize("tokenizer,count", [("union", 66), ("base", 64), (None, 66)])
def test_models_of_mergekits_tests(llamas, tmp_path, tokenizer, count):
    merge_models(llamas, base=llamas[0], out=tmp_path / "out", tokenizer=tokenizer)
    out = merged_rows(tmp_path / "out")
    assert len(out.ids) == len(out.tensors[EMBEDDING]) == count
    assert not any(text.startswith("<u") and text != "<unk>" for text in out.ids)


def test_a_stack_of_layers_with_a_union(llamas, tmp_path):
    slices = [
        {"sources": [{"model": str(llamas[0]), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(llamas[2]), "layer_range": [1, 2]}]},
    ]
    recipe = {"merge_method": "passthrough", "slices": slices, "tokenizer": {"source": "union"}}
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    merge_recipe(read_mergekit(tmp_path / "r.yml"), tmp_path / "out", SilentProgress())
    out = merged_rows(tmp_path / "out")
    assert len(out.ids) == len(out.tensors[EMBEDDING]) == 66
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["num_hidden_layers"]) == (66, 3)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_rows_of_8_bit_floats_with_scales(tmp_path, name):
    made = [make_model(tmp_path / "0", seed=0), make_model(tmp_path / "1", ("<x>",), seed=1)]
    tensors = {}
    for key, tensor in made[1].tensors.items():
        tensors[key] = tensor
        if key in (EMBEDDING, HEAD):
            tensors[key] = (tensor * 16).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale"] = torch.linspace(0.01, 0.1, len(tensor))[:, None]
    write(made[1].path, tensors)
    paths = [model.path for model in made]
    merge_models(paths, out=tmp_path / "out", tokenizer="union", dtype="fp32")
    out = merged_rows(tmp_path / "out").tensors[name].double()
    decoded = tensors[name].double() * tensors[f"{name}_scale"].double()
    first = made[0].tensors[name].double()
    truth = torch.cat([(first + decoded[:6]) / 2, decoded[6:]])
    assert torch.allclose(out, truth, rtol=2**-22, atol=1e-9)
