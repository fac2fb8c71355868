"""`tokenizer:` matches rows by token: expected rows by hand in fp64, ids by AutoTokenizer."""

import json

import numpy as np
import pytest
import torch
from support.merge.vocabulary.models import (
    EMBEDDING,
    HEAD,
    HIDDEN,
    OWN,
    assert_rows,
    make_model,
    mean_row,
    merged_rows,
)
from tokenizers import AddedToken

from merit_fast.errors import InputError
from merit_fast.merge import merge_models

BOTH = pytest.mark.parametrize("name", [EMBEDDING, HEAD])
CHAT = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base: the own tokens; chat: two more in another order; padded: two more without rows."""
    root = tmp_path_factory.mktemp("vocabularies")
    own = OWN[::-1]
    return {
        "base": make_model(root / "base", seed=1),
        "chat": make_model(root / "chat", CHAT, own=own, seed=2, rows=len(own) + 4),
        "padded": make_model(root / "padded", ("<u0>", "<u1>"), rows=len(OWN), seed=3),
        "tool": make_model(root / "tool", ("<tool>", CHAT[1]), seed=4),
    }


def merge(models, tmp_path, weights=None, **options):
    paths = [model.path for model in models]
    merge_models(paths, weights, out=tmp_path / "out", **options)
    return merged_rows(tmp_path / "out")


@BOTH
def test_union_has_every_token_of_every_model(models, tmp_path, name):
    three = [models[key] for key in ("base", "chat", "padded")]
    out = merge(three, tmp_path, [1, 2, 3], base=three[0].path, tokenizer="union")
    expected = {
        token: np.average([m.row(name, token) for m in three], 0, [1, 2, 3]) for token in OWN
    }
    expected |= {token: models["chat"].row(name, token) for token in CHAT}
    assert_rows(out, name, expected)
    assert [out.ids[token] for token in OWN] == [*range(len(OWN))]
    assert len(out.tensors[name]) == len(expected)
    assert json.loads((out.path / "config.json").read_text())["vocab_size"] == len(expected)


@BOTH
def test_base_keeps_its_tokens_and_drops_the_others(models, tmp_path, name):
    three = [models[key] for key in ("chat", "base", "padded")]
    out = merge(three, tmp_path, base=models["base"].path, tokenizer="base")
    assert_rows(out, name, {token: mean_row(three, name, token) for token in OWN})


def test_without_a_base_the_first_model_counts(models, tmp_path):
    out = merge([models["chat"], models["base"]], tmp_path, tokenizer="base")
    assert out.ids == models["chat"].ids
    assert np.array_equal(out.row(HEAD, CHAT[0]), models["chat"].row(HEAD, CHAT[0]))


@BOTH
def test_a_models_tokenizer_by_its_path(models, tmp_path, name):
    two = [models["base"], models["chat"]]
    out = merge(two, tmp_path, tokenizer=str(models["chat"].path))
    assert out.ids == models["chat"].ids
    assert_rows(out, name, {token: mean_row(two, name, token) for token in out.ids})


def test_a_tokenizer_of_no_model_gives_zeros_to_new_tokens(models, tmp_path):
    from support.merge.vocabulary.models import make_tokenizer

    other = make_tokenizer(tmp_path / "other", ("<new>",), own=("<s>", "a", "<unk>", "</s>"))
    two = [models["base"], models["chat"]]
    out = merge(two, tmp_path, tokenizer=str(tmp_path / "other"))
    assert out.ids == other.get_vocab()
    expected = {token: mean_row(two, EMBEDDING, token) for token in ("<s>", "a", "<unk>", "</s>")}
    assert_rows(out, EMBEDDING, {**expected, "<new>": np.zeros(HIDDEN)})


@BOTH
@pytest.mark.parametrize("has_base", [True, False])
def test_a_token_of_several_models_is_their_mean_for_the_others(models, tmp_path, name, has_base):
    """base lacks <|im_end|>; with the base "tool", which has it, the base's row stands in."""
    three = [models[key] for key in ("base", "chat", "tool")]
    base = models["tool"].path if has_base else None
    out = merge(three, tmp_path, [5, 1, 1], base=base, tokenizer="union")
    rows = [models["chat"].row(name, CHAT[1]), models["tool"].row(name, CHAT[1])]
    stand_in = rows[1] if has_base else (rows[0] + rows[1]) / 2
    truth = (5 * stand_in + rows[0] + rows[1]) / 7
    assert np.allclose(out.row(name, CHAT[1]), truth, rtol=2**-22, atol=1e-9)
    assert np.array_equal(out.row(name, "<tool>"), models["tool"].row(name, "<tool>"))


@BOTH
@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare_linear"])
def test_a_token_of_one_model_survives_methods_on_deltas(models, tmp_path, name, method):
    """Its row stands in for the base's too, so every delta is 0 or leads to it."""
    two = [models["chat"], models["padded"]]
    options = {"method": method} | ({} if method == "task_arithmetic" else {"density": 0.5})
    out = merge(two, tmp_path, base=models["base"].path, tokenizer="union", **options)
    assert np.array_equal(out.row(name, CHAT[0]), models["chat"].row(name, CHAT[0]))


@BOTH
def test_rows_up_to_a_multiple_are_the_mean_of_each_models_rows(models, tmp_path, name):
    two = [models["base"], models["chat"]]
    options = {"source": "union", "pad_to_multiple_of": 16}
    out = merge(two, tmp_path, [1, 3], base=two[0].path, tokenizer=options)
    assert len(out.tensors[name]) == 16
    base = [two[0].row(name, token) for token in OWN]
    chat = [two[1].row(name, token) for token in (*OWN, *CHAT)]
    base += [two[1].row(name, token) for token in CHAT]
    truth = (np.mean(base, 0) + 3 * np.mean(chat, 0)) / 4
    for row in out.tensors[name][len(OWN) + 2 :].double().numpy():
        assert np.allclose(row, truth, rtol=2**-21, atol=1e-9)


@BOTH
def test_rows_of_single_tokens(models, tmp_path, name):
    base = models["base"]
    chat = models["chat"]
    of_chat = {"kind": "model_token", "model": str(chat.path)}
    tokens = {
        "a": {"source": str(chat.path), "force": True},
        "b": {"source": "zero"},
        "</s>": {"source": {**of_chat, "token": CHAT[0]}, "force": True},
        CHAT[0]: {"source": "zero"},
        "<new>": {"source": {**of_chat, "token_id": 1}},
        "<nil>": {"source": {"kind": "zero"}},
    }
    options = {"source": "union", "tokens": tokens}
    out = merge([base, chat], tmp_path, base=base.path, tokenizer=options)
    expected = {token: mean_row([base, chat], name, token) for token in (*OWN, CHAT[1])}
    expected["a"] = chat.row(name, "a")
    expected["</s>"] = chat.row(name, CHAT[0])
    expected[CHAT[0]] = chat.row(name, CHAT[0]) / 2
    expected["<new>"] = chat.tensors[name][1].double().numpy()
    expected["<nil>"] = np.zeros(HIDDEN)
    assert_rows(out, name, expected)


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordLevel"])
def test_every_kind_of_tokenizer_gets_the_new_tokens(tmp_path, kind):
    first = make_model(tmp_path / "first", ("<x>",), kind=kind, seed=1)
    second = make_model(tmp_path / "second", ("<y>", "<x>"), kind=kind, seed=2)
    out = merge([first, second], tmp_path, tokenizer="union")
    assert_rows(
        out, EMBEDDING, {t: mean_row([first, second], EMBEDDING, t) for t in (*OWN, "<x>", "<y>")}
    )


def test_settings_of_added_tokens_come_from_the_first_model(tmp_path):
    from transformers import AutoTokenizer

    special = AddedToken("<x>", special=True, lstrip=True)
    first = make_model(tmp_path / "first", (special,), seed=1)
    second = make_model(tmp_path / "second", ("<x>", AddedToken("<y>", rstrip=True), "b"), seed=2)
    merge([first, second], tmp_path, tokenizer="union")
    decoder = AutoTokenizer.from_pretrained(tmp_path / "out").added_tokens_decoder
    by_text = {token.content: token for token in decoder.values()}
    assert by_text["<x>"].special and by_text["<x>"].lstrip
    assert by_text["<y>"].rstrip and not by_text["<y>"].special
    assert decoder[OWN.index("b")].content == "b"


@BOTH
def test_inputs_of_two_dtypes_are_read_exactly(tmp_path, name):
    first = make_model(tmp_path / "first", ("<x>",), dtype=torch.bfloat16, seed=1)
    second = make_model(tmp_path / "second", ("<y>",), dtype=torch.float16, seed=2)
    out = merge([first, second], tmp_path, tokenizer="union", dtype="fp32")
    tokens = (*OWN, "<x>", "<y>")
    assert_rows(out, name, {t: mean_row([first, second], name, t) for t in tokens})


def test_the_models_own_dtype_decides_where_rows_are_made(models, tmp_path):
    three = [
        make_model(tmp_path / f"m{k}", added, dtype=torch.bfloat16, seed=k)
        for k, added in enumerate(((), ("<x>", "<y>"), ("<y>", "<x>")))
    ]
    out = merge(three, tmp_path, tokenizer={"source": "union", "pad_to_multiple_of": 7})
    assert out.tensors[EMBEDDING].dtype == torch.bfloat16
    truth = torch.from_numpy(mean_row(three, EMBEDDING, "<x>")).to(torch.bfloat16)
    assert torch.equal(out.tensors[EMBEDDING][out.ids["<x>"]], truth)


def test_a_tied_head_follows_and_other_matrices_of_tokens_move_too(tmp_path):
    def model(number, added, rows):
        bias = torch.randn(rows)
        final = torch.randn(1, rows)
        extra = {"lm_head.bias": bias, "final_logits_bias": final}
        made = make_model(tmp_path / f"m{number}", added, rows=rows, seed=number, extra=extra)
        return made

    first = model(1, ("<x>", "<y>"), 9)
    second = model(2, ("<y>",), 8)
    out = merge([first, second], tmp_path, tokenizer="union")
    for token in (*OWN, "<x>", "<y>"):
        new = out.ids[token]
        for name in ("lm_head.bias", "final_logits_bias"):
            rows = [
                m.tensors[name].flatten()[m.ids[token]] for m in (first, second) if token in m.ids
            ]
            truth = torch.stack(rows).double().mean()
            assert abs(out.tensors[name].flatten()[new].double() - truth) < 1e-6
    assert out.tensors["final_logits_bias"].shape == (1, 8)


def test_an_own_matrix_that_nobody_knows_is_refused(tmp_path):
    made = [
        make_model(tmp_path / f"m{k}", seed=k, extra={"model.gate.weight": torch.zeros(6, 3)})
        for k in range(2)
    ]
    with pytest.raises(
        InputError, match="model.gate.weight: has a dimension of 6, .* unknown name"
    ):
        merge(made, tmp_path, tokenizer="union")


def test_load_merged_makes_the_same_rows(tmp_path):
    pytest.importorskip("transformers")
    from support.merge.vocabulary.models import make_tokenizer
    from support.tiny import make_model as make_llama

    from merit_fast.merge import load_merged

    sizes = dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, pad_token_id=None)
    for name, added, rows in (("a", (), 6), ("b", ("<x>",), 9)):
        make_llama(tmp_path / name, vocab_size=rows, seed=rows, **sizes)
        make_tokenizer(tmp_path / name, added)
    paths = [tmp_path / "a", tmp_path / "b"]
    merge_models(paths, out=tmp_path / "out", tokenizer="union")
    model = load_merged(paths, tokenizer="union")
    out = merged_rows(tmp_path / "out")
    assert model.config.vocab_size == 7 == len(out.tensors[EMBEDDING])
    assert torch.equal(model.state_dict()[EMBEDDING], out.tensors[EMBEDDING])
    assert not list(tmp_path.glob("**/*.f64"))
