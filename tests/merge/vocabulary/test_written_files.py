"""Files next to the weights: tokens without a row, older lists of tokens, ids in configs."""

import json

import pytest
from support.merge.vocabulary.models import OWN, make_model, make_tokenizer, merged_rows

from merit_fast.errors import InputError
from merit_fast.merge import merge_models


def read(file):
    return json.loads(file.read_text())


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordLevel"])
def test_tokens_without_a_row_leave_the_tokenizer(tmp_path, kind):
    """The model has 5 rows, "ab" and the added token have none."""
    first = make_model(tmp_path / "first", ("<u>",), rows=5, kind=kind, seed=1)
    second = make_model(tmp_path / "second", ("<x>",), kind=kind, seed=2)
    merge_models([first.path, second.path], out=tmp_path / "out", tokenizer="base")
    out = merged_rows(tmp_path / "out")
    assert out.ids == {text: number for number, text in enumerate(OWN[:5])}
    if kind == "BPE":
        assert read(tmp_path / "out/tokenizer.json")["model"]["merges"] == []


def test_older_lists_of_tokens_agree(tmp_path):
    first = make_model(tmp_path / "first", ("<x>",), seed=1)
    second = make_model(tmp_path / "second", ("<y>",), seed=2)
    (first.path / "added_tokens.json").write_text(json.dumps({"<x>": 6}))
    config = read(first.path / "tokenizer_config.json")
    config["added_tokens_decoder"] = {"6": {"content": "<x>", "special": False}}
    (first.path / "tokenizer_config.json").write_text(json.dumps(config))
    merge_models([first.path, second.path], out=tmp_path / "out", tokenizer="union")
    assert read(tmp_path / "out/added_tokens.json") == {"<x>": 6, "<y>": 7}
    decoder = read(tmp_path / "out/tokenizer_config.json")["added_tokens_decoder"]
    assert [decoder[number]["content"] for number in ("1", "6", "7")] == ["<s>", "<x>", "<y>"]
    assert merged_rows(tmp_path / "out").ids == {**first.ids, "<y>": 7}


def test_ids_of_tokens_follow_the_tokenizer(tmp_path):
    ids = {"bos_token_id": 1, "eos_token_id": [2, 6], "pad_token_id": None, "image_token_id": 6}
    first = make_model(tmp_path / "first", ("<x>",), seed=1, **ids, text_config={"bos_token_id": 1})
    second = make_model(tmp_path / "second", ("<y>", "<x>"), own=OWN[::-1], seed=2)
    generation = {"eos_token_id": 2, "suppress_tokens": [6, 1]}
    (first.path / "generation_config.json").write_text(json.dumps(generation))
    merge_models([first.path, second.path], out=tmp_path / "out", tokenizer=str(second.path))
    out = merged_rows(tmp_path / "out").ids
    config = read(tmp_path / "out/config.json")
    assert config["bos_token_id"] == config["text_config"]["bos_token_id"] == out["<s>"] == 4
    assert config["eos_token_id"] == [out["</s>"], out["<x>"]]
    assert config["image_token_id"] == out["<x>"] and config["pad_token_id"] is None
    assert read(tmp_path / "out/generation_config.json") == {
        "eos_token_id": out["</s>"],
        "suppress_tokens": [out["<x>"], out["<s>"]],
    }


def test_a_token_that_is_gone_gives_way_to_the_tokenizers_own(tmp_path):
    first = make_model(tmp_path / "first", ("<end>",), seed=1, eos_token_id=6)
    second = make_model(tmp_path / "second", own=OWN[::-1], seed=2)
    paths = [first.path, second.path]
    merge_models(paths, out=tmp_path / "out", tokenizer=str(second.path))
    assert read(tmp_path / "out/config.json")["eos_token_id"] == second.ids["</s>"]
    config = read(first.path / "config.json") | {"image_token_id": 6}
    (first.path / "config.json").write_text(json.dumps(config))
    rule = "config.json: image_token_id: 6 is a token that the output's vocabulary, of .*, lacks"
    with pytest.raises(InputError, match=rule):
        merge_models(paths, out=tmp_path / "out2", tokenizer=str(second.path))
    assert not (tmp_path / "out2").exists()


def test_ids_in_forms_of_their_own_are_named(tmp_path):
    first = make_model(tmp_path / "first", seed=1, forced_decoder_ids=[[1, 2]])
    second = make_model(tmp_path / "second", own=OWN[::-1], seed=2)
    with pytest.raises(InputError, match="forced_decoder_ids: holds ids of tokens that cannot be"):
        merge_models([first.path, second.path], out=tmp_path / "out", tokenizer=str(second.path))


def test_files_of_another_tokenizer_replace_the_first_models(tmp_path):
    first = make_model(tmp_path / "first", seed=1)
    second = make_model(tmp_path / "second", ("<x>",), seed=2)
    (first.path / "merges.txt").write_text("of first")
    (first.path / "chat_template.jinja").write_text("{{ 'first' }}")
    (second.path / "special_tokens_map.json").write_text("{}")
    (second.path / "LICENSE").write_text("of second")
    paths = [first.path, second.path]
    merge_models(paths, out=tmp_path / "out", tokenizer=str(second.path))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "special_tokens_map.json" in names
    assert not names & {"merges.txt", "chat_template.jinja", "LICENSE"}


@pytest.mark.parametrize(
    "file,text,message",
    [
        ("added_tokens.json", "[]", "added_tokens.json: must be a JSON object"),
        ("tokenizer_config.json", "3", "tokenizer_config.json: must be a JSON object"),
        ("merges", [["a", "b", "c"]], "model.merges: must be pairs of tokens, got "),
        ("merges", ["ab"], "model.merges: must be pairs of tokens, got 'ab'"),
    ],
)
def test_files_of_the_tokenizer_are_checked_before_anything_is_written(
    tmp_path, file, text, message
):
    first = make_model(tmp_path / "first", seed=1)
    second = make_model(tmp_path / "second", ("<x>",), rows=5, seed=2)
    if file == "merges":
        values = read(second.path / "tokenizer.json")
        values["model"]["merges"] = text
        (second.path / "tokenizer.json").write_text(json.dumps(values))
    else:
        (second.path / file).write_text(text)
    with pytest.raises(InputError, match=message):
        merge_models([first.path, second.path], out=tmp_path / "out", tokenizer=str(second.path))
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}


def test_a_text_that_is_no_unicode_is_written_as_it_was_read(tmp_path):
    first = make_model(tmp_path / "first", seed=1)
    second = make_model(tmp_path / "second", ("<x>",), seed=2)
    file = first.path / "tokenizer.json"
    file.write_text(file.read_text().replace('"version"', '"odd": "\\ud800", "version"', 1))
    merge_models([first.path, second.path], out=tmp_path / "out", tokenizer="union")
    assert read(tmp_path / "out/tokenizer.json")["odd"] == "\ud800"


def test_the_model_card_names_models_without_their_folders(tmp_path):
    first = make_model(tmp_path / "first", seed=1)
    second = make_model(tmp_path / "second", ("<x>",), seed=2)
    of_first = {"model": str(first.path), "token": "a"}
    tokens = {"a": {"source": str(first.path), "force": True}, "<new>": {"source": of_first}}
    for options in (str(second.path), {"source": str(second.path), "tokens": tokens}):
        merge_models([first.path, second.path], out=tmp_path / "out", tokenizer=options)
        card = (tmp_path / "out/README.md").read_text()
        assert str(tmp_path) not in card and "second" in card.split("## Method")[1]
    assert '"<new>": {"source": {"kind": "model_token", "model": "first", "token": "a"' in card


# ---- options that name nothing
@pytest.mark.parametrize(
    "options,message",
    [
        ("onion", r"tokenizer.source: must be union, base, ids, .* got 'onion': "),
        (
            {"source": "union", "tokens": {"a": {"source": "nowhere"}}},
            r"tokenizer.tokens.a.source: must be zero or one of .*, got 'nowhere'",
        ),
        (
            {"tokens": {"a": {"source": {"model": "{second}", "token_id": 7}}}},
            r"tokenizer.tokens.a.source.token_id: must be at least 0 and below 7",
        ),
        (
            {"tokens": {"a": {"source": {"model": "{second}", "token": "<z>"}}}},
            r"tokenizer.tokens.a.source: .*second has no token '<z>' with a row",
        ),
        (
            {"tokens": {"<new>": {"source": "{second}"}}},
            r"tokenizer.tokens.<new>.source: .*second has no token '<new>' with a row",
        ),
        (
            {"source": "base", "pad_to_multiple_of": 0},
            "pad_to_multiple_of: must be between 1 and 65536",
        ),
        ({"source": "ids", "tokens": {"a": {"source": "zero"}}}, "tokens: must be absent"),
        ({"source": "base", "pad": 2}, "tokenizer.pad: unknown key"),
    ],
)
def test_options_that_name_nothing(tmp_path, options, message):
    first = make_model(tmp_path / "first", seed=1)
    second = make_model(tmp_path / "second", ("<x>",), seed=2)
    if not isinstance(options, str):
        options = json.loads(json.dumps(options).replace("{second}", str(second.path)))
    with pytest.raises(InputError, match=message):
        merge_models([first.path, second.path], out=tmp_path / "out", tokenizer=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"vocab": 3}, "model.vocab: must be a mapping of token to id, or a list of"),
        ({"vocab": {"a": -1}}, "model.vocab.a: must be an integer of at least 0"),
        ({"vocab": {"a": True}}, "model.vocab.a: must be an integer of at least 0"),
        ({"vocab": [["a"]]}, r"model.vocab\[0\]: must be \[token, score\]"),
        ({"vocab": {"z": 0}}, "second: shares no token with .*first/tokenizer.json"),
        ({}, "holds no tokenizer.json that lists tokens"),
    ],
)
def test_tokenizers_in_another_form_are_named(tmp_path, change, message):
    first = make_model(tmp_path / "first", seed=1)
    second = make_model(tmp_path / "second", seed=2)
    values = {"model": change, "added_tokens": []}
    (second.path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        merge_models([first.path, second.path], out=tmp_path / "out", tokenizer="base")


def test_a_vision_model_has_no_vocabulary(tmp_path):
    import torch
    from support.merge.merges import write

    paths = [write(tmp_path / str(n), {"patch.weight": torch.zeros(3, 3)}) for n in range(2)]
    with pytest.raises(InputError, match="tokenizer: must be absent, .* no input embedding"):
        merge_models(paths, out=tmp_path / "out", tokenizer="union")
    merge_models(paths, out=tmp_path / "out")


def test_the_command_line_takes_both_options(tmp_path):
    from merit_fast.cli.merge.command import merge_command
    from merit_fast.progress import SilentProgress

    first = make_model(tmp_path / "first", seed=1)
    second = make_model(tmp_path / "second", ("<x>",), seed=2)
    make_tokenizer(tmp_path / "first")
    models = [str(first.path), str(second.path)]
    assignments = ["tokenizer={source: union, pad_to_multiple_of: 8}", "chat_template=chatml"]
    out = str(tmp_path / "out")
    merge_command(out, models, None, None, None, assignments, SilentProgress())
    assert len(merged_rows(tmp_path / "out").tensors["lm_head.weight"]) == 8
