"""Without `tokenizer:` ids and texts must agree; a longer model gives the rows others lack."""

import json
import re

import numpy as np
import pytest
import torch
from support.merge.merges import load
from support.merge.vocabulary.models import (
    EMBEDDING,
    HEAD,
    OWN,
    make_model,
    make_tokenizer,
    merged_rows,
)

from merit_fast.errors import InputError
from merit_fast.merge import merge_models

BOTH = pytest.mark.parametrize("name", [EMBEDDING, HEAD])
LENGTH = len(OWN)


def merge(models, tmp_path, weights=None, **options):
    summary = merge_models([m.path for m in models], weights, out=tmp_path / "out", **options)
    return merged_rows(tmp_path / "out"), summary


@BOTH
@pytest.mark.parametrize("order", [1, -1])
def test_the_longer_vocabulary_gives_the_rows_that_the_other_lacks(tmp_path, name, order):
    short = make_model(tmp_path / "short", rows=LENGTH, seed=1)
    longer = make_model(tmp_path / "long", ("<x>", "<y>"), seed=2)
    two = [short, longer][::order]
    out, summary = merge(two, tmp_path, [1, 3] if order == 1 else [3, 1])
    both = (short.tensors[name].double() + 3 * longer.tensors[name][:LENGTH].double()) / 4
    assert torch.allclose(out.tensors[name][:LENGTH].double(), both, rtol=2**-22)
    assert torch.equal(out.tensors[name][LENGTH:], longer.tensors[name][LENGTH:])
    assert out.ids == longer.ids
    assert json.loads((out.path / "config.json").read_text())["vocab_size"] == LENGTH + 2
    assert "8 rows by id" in summary["vocabulary"]


@BOTH
def test_padding_rows_come_from_the_models_that_have_them(tmp_path, name):
    made = [make_model(tmp_path / str(n), rows=n, seed=n) for n in (LENGTH, 8, 11)]
    out, _ = merge(made, tmp_path, [5, 1, 2])
    first, second, third = (model.tensors[name].double() for model in made)
    mean = (second[6:8] + third[6:8]) / 2
    middle = (5 * mean + second[6:8] + 2 * third[6:8]) / 8
    truth = torch.cat([(5 * first + second[:6] + 2 * third[:6]) / 8, middle, third[8:]])
    assert torch.allclose(out.tensors[name].double(), truth, rtol=2**-22)
    assert out.ids == made[0].ids


@BOTH
def test_a_padding_row_does_not_thin_another_models_token(tmp_path, name):
    """Both have 8 rows; only one has a token at row 6."""
    plain = make_model(tmp_path / "plain", rows=8, seed=1)
    tool = make_model(tmp_path / "tool", ("<tool>",), rows=8, seed=2)
    out, _ = merge([plain, tool], tmp_path)
    assert torch.equal(out.tensors[name][6], tool.tensors[name][6])
    truth = (plain.tensors[name][7].double() + tool.tensors[name][7].double()) / 2
    assert torch.allclose(out.tensors[name][7].double(), truth, rtol=2**-22)
    assert out.ids == tool.ids


@pytest.mark.parametrize("rows", [8, None])
@pytest.mark.parametrize("other", [("<y>",), ("<y>", "<x>"), ("b2", "<x>")])
def test_texts_that_disagree_are_named_with_both_ids(tmp_path, rows, other):
    first = make_model(tmp_path / "first", ("<x>",), rows=rows, seed=1)
    second = make_model(tmp_path / "second", other, rows=rows, seed=2)
    found = f"id {second.ids['<x>']}" if "<x>" in second.ids else "no such token"
    message = (
        f"{second.path}/tokenizer.json: '<x>': must have id 6 as in {first.path}/tokenizer.json, "
        f"got {found}; id 6 is '{other[0]}'; tokenizer=union or base matches rows by token"
    )
    with pytest.raises(InputError, match="^" + re.escape(message)):
        merge([first, second], tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_text_at_two_ids_is_named_where_no_id_has_two_texts(tmp_path):
    """The second has <x> at 7, and nothing at 6."""
    first = make_model(tmp_path / "first", ("<x>",), rows=8, seed=1)
    second = make_model(tmp_path / "second", rows=8, own=OWN, seed=2)
    file = tmp_path / "second" / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"]["<x>"] = 7
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match="'<x>': must have id 6 as in .*, got id 7"):
        merge([first, second], tmp_path)


@BOTH
def test_ids_merges_by_id_whatever_the_texts(tmp_path, name):
    first = make_model(tmp_path / "first", ("<x>",), seed=1)
    second = make_model(tmp_path / "second", ("<y>", "<x>"), seed=2)
    out, _ = merge([first, second], tmp_path, tokenizer="ids")
    one, two = (model.tensors[name].double() for model in (first, second))
    truth = torch.cat([(one + two[:7]) / 2, two[7:]])
    assert torch.allclose(out.tensors[name].double(), truth, rtol=2**-22)
    assert out.ids == second.ids


def test_without_files_of_texts_only_ids_joins_unequal_lengths(tmp_path):
    made = [make_model(tmp_path / str(n), rows=n, seed=n) for n in (6, 8)]
    for model in made:
        (model.path / "tokenizer.json").unlink()
    paths = [model.path for model in made]
    with pytest.raises(InputError, match="tokenizer=ids matches rows by their ids, unchecked"):
        merge_models(paths, out=tmp_path / "out")
    merge_models(paths, out=tmp_path / "out", tokenizer="ids")
    assert torch.equal(load(tmp_path / "out")[HEAD][6:], made[1].tensors[HEAD][6:])


def test_equal_texts_in_files_of_other_bytes_change_nothing(tmp_path):
    made = [make_model(tmp_path / str(n), ("<x>",), rows=9, seed=n) for n in range(2)]
    file = made[1].path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    out, summary = merge(made, tmp_path)
    assert summary["vocabulary"] is None
    assert (out.path / "tokenizer.json").read_bytes() == (
        made[0].path / "tokenizer.json"
    ).read_bytes()


def test_no_models_tokenizer_has_all_tokens(tmp_path):
    """<x> at 6 in one, <y> at 7 in the other, which has nothing at 6."""
    first = make_model(tmp_path / "first", ("<x>",), rows=8, seed=1)
    second = make_model(tmp_path / "second", rows=8, seed=2)
    file = second.path / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"]["<y>"] = 7
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match="no model has the tokens of all others; tokenizer=union"):
        merge([first, second], tmp_path)


def test_a_longer_model_with_deltas_from_a_shorter_base(tmp_path):
    """The base is shorter: the token of the longer model stands in, and its delta is 0."""
    base = make_model(tmp_path / "base", seed=1)
    longer = make_model(tmp_path / "long", ("<x>",), seed=2)
    out, _ = merge([longer, base], tmp_path, base=base.path, method="ties", density=0.5)
    assert torch.equal(out.tensors[HEAD][6], longer.tensors[HEAD][6])


def test_the_first_models_tokenizer_stays_where_it_has_all_tokens(tmp_path):
    """The base has no chat template; the third model is longer by padding."""
    base = make_model(tmp_path / "base", seed=1)
    chat = make_model(tmp_path / "chat", seed=2)
    longer = make_model(tmp_path / "long", rows=9, seed=3)
    (chat.path / "chat_template.jinja").write_text("{{ 'chat' }}")
    merge([chat, longer], tmp_path, base=base.path, method="task_arithmetic")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ 'chat' }}"


def test_a_matrix_with_rows_of_its_own_stays_or_is_named(tmp_path):
    """Gemma 3n's per-layer embedding has fewer rows than the embedding."""
    per_layer = "model.embed_tokens_per_layer.weight"
    short = make_model(tmp_path / "short", seed=1, extra={per_layer: torch.ones(5, 3)})
    longer = make_model(tmp_path / "long", ("<x>",), seed=2, extra={per_layer: torch.zeros(5, 3)})
    out, _ = merge([short, longer], tmp_path)
    assert torch.equal(out.tensors[per_layer], torch.full((5, 3), 0.5))
    other = make_model(
        tmp_path / "other", own=OWN[::-1], seed=3, extra={per_layer: torch.zeros(5, 3)}
    )
    with pytest.raises(InputError, match=f"{per_layer}: must have 6 rows as the input embedding"):
        merge_models([short.path, other.path], out=tmp_path / "out2", tokenizer="base")


def test_heads_of_another_length_are_named(tmp_path):
    made = [make_model(tmp_path / str(n), ("<x>",) * n, seed=n) for n in range(2)]
    from safetensors.torch import save_file

    tensors = {**made[0].tensors, HEAD: torch.zeros(9, 10)}
    save_file(tensors, made[0].path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lm_head.weight: must have 6 rows as the input embedding"):
        merge(made, tmp_path)


def test_tokenizers_that_list_nothing_are_not_compared(tmp_path):
    made = [make_model(tmp_path / str(n), rows=9, seed=n) for n in range(2)]
    for number, model in enumerate(made):
        (model.path / "tokenizer.json").write_text(json.dumps({"number": number}))
    merge_models([m.path for m in made], out=tmp_path / "out")
    mean = np.mean([model.tensors[HEAD].double().numpy() for model in made], 0)
    assert np.allclose(load(tmp_path / "out")[HEAD].double().numpy(), mean, rtol=2**-22)


def test_a_resumed_merge_knows_another_tokenizer(tmp_path):
    """The tokens are part of the fingerprint: the output is not kept as it is."""
    made = [make_model(tmp_path / str(n), rows=8, seed=n) for n in range(2)]
    merge(made, tmp_path)
    make_tokenizer(made[1].path, ("<x>",))
    out, _ = merge(made, tmp_path)
    assert torch.equal(out.tensors[HEAD][6], made[1].tensors[HEAD][6])
