"""`merit-fast data`: rows, tokens, notes and the text that enters the loss."""

import json

import pytest
import yaml
from support.runs import run_values


@pytest.fixture
def config_file(tmp_path, tiny_model, tiny_mixture, monkeypatch):
    """A YAML in another folder than the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    file = tmp_path / "conf" / "run.yml"
    mixture = [tiny_mixture[0], {k: v for k, v in tiny_mixture[1].items() if k != "eval_path"}]
    file.write_text(yaml.safe_dump(run_values(tiny_model, mixture)))
    return file


def test_a_row_of_each_dataset_shows_the_loss(call, config_file):
    code, out, err = call("data", "conf/run.yml")
    assert code == 0, err
    assert "  | Give the capital. Peru<|im_end|>\n  | <|im_start|>assistant\n" in out
    assert "  | ⟦Lima<|im_end|>⟧\n" in out and out.count("⟦") == 2
    assert "capitals (train): examples: 8; tokens: " in out
    assert "capitals (eval): examples: 2; tokens: " in out
    assert "codes (eval): no held-out rows" in out
    assert not (config_file.parent / "out").exists()


def test_counts_and_notes_as_json(call, config_file):
    code, out, _ = call("data", "conf/run.yml", "data.max_length=22", "--rows", "3", "--json")
    shown = json.loads(out)
    assert code == 0 and set(shown) == {"capitals", "codes"} and set(shown["codes"]) == {"train"}
    train = shown["capitals"]["train"]
    assert len(train["rows"]) == 3 and train["longest"] <= 22
    assert any("longer than 22 tokens" in note for note in train["notes"])
    whole = json.loads(call("data", "conf/run.yml", "--rows", "99", "--json")[1])
    rows = whole["capitals"]["train"]["rows"]
    assert len(rows) == whole["capitals"]["train"]["examples"] == 8
    assert rows[0] == [
        {
            "text": "<|im_start|>user\nGive the capital. Peru<|im_end|>\n<|im_start|>assistant\n",
            "in_loss": False,
        },
        {"text": "Lima<|im_end|>", "in_loss": True},
    ]


def test_bad_input_is_one_line(call, config_file):
    for words, message in (
        (["conf/run.yml", "--rows", "-1"], "--rows: must be at least 0, got -1"),
        ([], "data: needs a CONFIG.yml, or --model and --dataset"),
    ):
        code, out, err = call("data", *words)
        assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
