"""`merit-fast data`: counts, notes and the texts with their loss; refuses what a run refuses."""

import json
from pathlib import Path

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
    rows = {line.split("  ")[0]: line.split()[2:] for line in out.splitlines() if "  " in line}
    assert rows["capitals (train)"][:2] == ["8", "8"] and rows["capitals (eval)"][0] == "2"
    assert "no held-out rows: codes" in out
    assert not (config_file.parent / "out").exists()


def test_counts_and_notes_as_json(call, config_file):
    code, out, _ = call("data", "conf/run.yml", "data.max_length=22", "--show", "3", "--json")
    shown = json.loads(out)
    assert code == 0 and shown["leaks"] == 0
    parts = {(item["name"], item["part"]): item for item in shown["datasets"]}
    assert set(parts) == {("capitals", "train"), ("capitals", "eval"), ("codes", "train")}
    train = parts["capitals", "train"]
    assert len(train["examples"]) == 3
    assert max(len(example["input_ids"]) for example in train["examples"]) <= 22
    assert any("longer than 22 tokens" in note for note in train["notes"])
    dropped = json.loads(
        call("data", "conf/run.yml", "data.max_length=22", "data.too_long=drop", "--json")[1]
    )["datasets"][0]
    assert dropped["num_rows"] == 8 and dropped["skipped"] == 8 - dropped["num_examples"] > 0


def test_an_example_holds_its_text_and_the_characters_in_the_loss(call, config_file):
    shown = json.loads(call("data", "conf/run.yml", "--show", "99", "--json")[1])
    examples = shown["datasets"][0]["examples"]
    assert len(examples) == 8
    first = examples[0]
    prompt = "<|im_start|>user\nGive the capital. Peru<|im_end|>\n<|im_start|>assistant\n"
    assert first["text"].startswith(prompt)
    [[start, end]] = first["loss"]
    assert (start, first["text"][start:end]) == (len(prompt), "Lima<|im_end|>")
    targets = [label for label in first["labels"] if label != -100]
    assert first["input_ids"][-len(targets) :] == targets


def test_shared_rows_and_leaks_are_counted(call, config_file, tiny_mixture):
    values = yaml.safe_load(config_file.read_text())
    values["mixture"][1]["path"] = values["mixture"][0]["path"]
    values["mixture"][0]["eval_path"] = str(config_file.with_name("leak.jsonl"))
    rows = Path(values["mixture"][0]["path"]).read_text().splitlines()
    config_file.with_name("leak.jsonl").write_text(rows[3] + "\n")
    config_file.write_text(yaml.safe_dump(values))
    code, _, err = call("data", "conf/run.yml")
    assert code == 2 and ".jsonl:4 and 1 more; capitals holds out" in err, err
    assert "leak.jsonl:1 (data.leaks: drop" in err
    code, out, _ = call("data", "conf/run.yml", "data.leaks=keep", "--json")
    assert code == 0 and json.loads(out)["leaks"] == 2 * rows.count(rows[3])
    code, out, _ = call("data", "conf/run.yml", "data.leaks=drop")
    count = len(set(rows)) - 1
    assert code == 0 and f"training conversations in both capitals and codes: {count}" in out
    assert f"{rows.count(rows[3])} rows dropped: held out too" in out


def test_what_a_run_refuses_is_one_line(call, config_file):
    values = yaml.safe_load(config_file.read_text())
    del values["mixture"][0]["eval_path"]
    bare = config_file.with_name("bare.yml")
    bare.write_text(yaml.safe_dump(values))
    for words, message in (
        (["conf/run.yml", "--show", "-1"], "--show: must be at least 0, got -1"),
        ([], "data: needs a CONFIG.yml, or --model and --dataset"),
        (["conf/bare.yml"], "no dataset of the mixture has held-out rows; give one an eval_path"),
    ):
        code, out, err = call("data", *words)
        assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
