"""`merit-fast init`: a folder of files becomes a YAML that `run` accepts, from any directory."""

import dataclasses
import json
import re
import shutil
import typing

import pytest
import yaml
from support.tiny import TASKS, chat_row, make_tokenizer

from merit_fast.init.scan import scan
from merit_fast.options.parser import parse, to_plain
from merit_fast.pipeline.config import RunConfig, read_run_config

ALPACA = [{"instruction": f"{i} + 1", "output": str(i + 1)} for i in range(40)]
PAIRS = [{"prompt": f"{i}?", "completion": str(i)} for i in range(8)]
QUICK = ["split.examples=4", "split.proj_dim=4096", "evaluate.interpolate=[]"]
QUICK += ["evaluate.max_new_tokens=1", "output=out"]


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, tiny_model):
    """Datasets in several layouts next to files that no run can use."""
    folder = tmp_path / "my data"
    instruction, facts = TASKS["capitals"]
    rows = [chat_row(instruction, question, answer) for question, answer in facts.items()]
    write(folder / "capitals.jsonl", rows[2:])
    write(folder / "capitals.eval.jsonl", rows[:2])
    write(folder / "train" / "sums.jsonl", ALPACA[:30])
    write(folder / "held-out" / "sums.jsonl", ALPACA[30:])
    write(folder / "echo" / "train.jsonl", PAIRS[:4])
    write(folder / "echo" / "val.jsonl", PAIRS[4:6])
    write(folder / "echo" / "test.jsonl", PAIRS[6:])
    for i in range(2):
        write(folder / "parts" / f"train-0000{i}-of-00002.jsonl", ALPACA[i::2])
    write(folder / "unknown.jsonl", [{"text": "no row of a known format"}])
    write(folder / "alone_test.jsonl", PAIRS)
    array = [{"prompt": f"{i} + {i}", "completion": str(2 * i)} for i in range(20)]
    (folder / "array.json").write_text(json.dumps(array))
    (folder / "table.xlsx").write_text("a,b\n")
    (folder / "notes.json").write_text('{\n  "no": "rows"\n}\n')
    shutil.copytree(tiny_model, folder / "BASE")
    return folder


def test_a_folder_becomes_a_yaml_that_run_accepts(call, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("init", "my data", "--model", "my data/BASE", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["file"] == "my data/merit.yml"
    assert result["datasets"] == ["array", "capitals", "echo", "parts", "sums"]
    reasons = "\n".join(result["unused"])
    assert len(result["unused"]) == 3 and "notes.json" not in reasons
    for line in (
        "unknown.jsonl:1: unknown columns",
        "alone_test.jsonl: has the name of held-out rows",
        "table.xlsx: not read: unpack it, or convert it to JSONL or Parquet",
    ):
        assert line in reasons
    text = (folder / "merit.yml").read_text()
    assert all(f"  # not used: {reason}\n" in text for reason in result["unused"])
    assert "# sums: 30 rows (alpaca), " in text and "not used: val.jsonl" in text
    assert "tokens of answers" in text and "characters" not in text
    monkeypatch.chdir("/")
    config = read_run_config(folder / "merit.yml")
    assert config.data.leaks == "drop", "parts and sums share rows that sums holds out"
    assert (config.model, config.split.groups) == (str(folder / "BASE"), 2)
    assert config.output == str(folder / "runs/merit")
    paths = {entry.name: (entry.path, entry.eval_path) for entry in config.mixture}
    assert paths == {
        "array": (f"{folder}/array.json", None),
        "capitals": (f"{folder}/capitals.jsonl", f"{folder}/capitals.eval.jsonl"),
        "sums": (f"{folder}/train/sums.jsonl", f"{folder}/held-out/sums.jsonl"),
        "echo": (f"{folder}/echo/train.jsonl", f"{folder}/echo/test.jsonl"),
        "parts": (f"{folder}/parts", None),
    }
    monkeypatch.chdir(tmp_path)
    code, out, err = call("run", "my data/merit.yml", *QUICK, "--json")
    assert code == 0, err
    assert set(json.loads(out)["split"]) == set(paths)


def test_every_default_stands_as_a_comment(call, folder):
    assert call("init", folder)[0] == 0
    text = (folder / "merit.yml").read_text()
    values = yaml.safe_load(text)
    assert set(values) == {field.name for field in dataclasses.fields(RunConfig)} - {"threads"}
    values = yaml.safe_load(re.sub(r"^( {0,2})# (\w+: )", r"\1\2", after_mixture(text), flags=re.M))
    hints = typing.get_type_hints(RunConfig)
    assert values["data"].pop("leaks") == "drop"  # written, not a default
    values["data"]["leaks"] = "error"
    values["train"]["controls"] = to_plain(hints["train"]().controls)  # written, not a default
    for section in ("data", "train", "merge", "evaluate"):
        default = hints[section]()
        assert set(values[section]) == {field.name for field in dataclasses.fields(default)}
        assert parse(hints[section], values[section], section) == default
    default = hints["split"](groups=2)
    assert set(values["split"]) == {field.name for field in dataclasses.fields(default)}
    assert parse(hints["split"], values["split"], "split") == default
    assert values["threads"] is None


def after_mixture(text):
    return text[text.index("\ndata:") :]


def test_a_yaml_without_a_model_is_refused_in_one_line(call, folder, monkeypatch):
    monkeypatch.chdir(folder)
    code, out, _ = call("init")
    assert code == 0 and "fill in `model:` in merit.yml" in out
    code, _, err = call("run", "merit.yml")
    rule = "error: merit.yml: model: is empty; it must be a model's folder or a hub id\n"
    assert (code, err) == (2, rule)
    config = read_run_config(folder / "merit.yml", ["model=BASE"])
    assert config.mixture[1].path == str(folder / "capitals.jsonl")


def test_files_are_named_and_nothing_is_overwritten(call, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [folder / "train" / "sums.jsonl", folder / "held-out" / "sums.jsonl"]
    assert call("init", *files, "--model", "org/name")[0] == 0
    (entry,) = read_run_config(tmp_path / "merit.yml").mixture
    assert (entry.name, entry.path) == ("sums", str(files[0]))
    assert read_run_config(tmp_path / "merit.yml").split.groups == 1
    before = (tmp_path / "merit.yml").read_text()
    code, _, err = call("init", folder / "capitals.jsonl")
    assert code == 2 and "merit.yml: exists already; --force overwrites it" in err
    assert (tmp_path / "merit.yml").read_text() == before
    assert call("init", folder / "capitals.jsonl", "--force", "--file", "merit.yml")[0] == 0
    assert read_run_config(tmp_path / "merit.yml", ["model=m"]).mixture[0].name == "capitals"


def test_files_in_folders_above_the_current_one(call, folder, monkeypatch):
    monkeypatch.chdir(folder / "echo")
    files = ["../train/sums.jsonl", "../held-out/sums.jsonl", "train.jsonl"]
    assert call("init", *files, "--file", "../new.yml")[0] == 0
    mixture = read_run_config(folder / "new.yml", ["model=m"]).mixture
    assert {entry.name: entry.path for entry in mixture} == {
        "sums": f"{folder}/train/sums.jsonl",
        "echo": f"{folder}/echo/train.jsonl",
    }


def test_names_that_yaml_reads_otherwise(call, tmp_path, tiny_model):
    for name in ("a, b: {c}.jsonl", "#d.jsonl", "e\nf.jsonl", "no.jsonl"):
        write(tmp_path / name, PAIRS)
    write(tmp_path / "g\nh.jsonl", [{"text": "no known row"}])
    assert call("init", tmp_path, "--model", tiny_model)[0] == 0
    config = read_run_config(tmp_path / "merit.yml")
    paths = {entry.name: entry.path for entry in config.mixture}
    assert paths == {
        "a-b-c": f"{tmp_path}/a, b: {{c}}.jsonl",
        "d": f"{tmp_path}/#d.jsonl",
        "e-f": f"{tmp_path}/e\nf.jsonl",
        "no": f"{tmp_path}/no.jsonl",
    }


def test_a_model_that_is_not_there_is_refused(call, folder):
    for model in ("./nowhere", "a/b/c", folder / "nowhere"):
        code, _, err = call("init", folder, "--model", model)
        assert code == 2 and f"model: {model}: must be a model's folder or a hub id" in err
    assert not (folder / "merit.yml").exists()


def test_a_share_is_held_out_where_no_file_is(call, folder, tiny_model):
    assert call("init", folder, "--model", tiny_model)[0] == 0
    config = read_run_config(folder / "merit.yml")
    shares = {entry.name: entry.eval_share for entry in config.mixture}
    assert shares == {"capitals": None, "echo": None, "parts": 0.1, "sums": None, "array": 0.1}


def test_nothing_that_a_run_can_use_is_an_error(call, tmp_path):
    (tmp_path / "empty").mkdir()
    rule = "no rows that a run can use: found no file of rows"
    assert f"empty: {rule}" in call("init", tmp_path / "empty")[2]
    write(tmp_path / "bad" / "a.jsonl", [{"text": "a"}])
    code, _, err = call("init", tmp_path / "bad")
    note, line = err.splitlines()
    assert (
        code == 2
        and note.endswith("a.jsonl: reading its rows")
        and "a.jsonl:1: unknown columns" in line
    )
    assert "nowhere: does not exist" in call("init", tmp_path / "nowhere")[2]
    assert not (tmp_path / "bad" / "merit.yml").exists()


def test_a_tokenizer_without_a_template_gets_the_plain_one(call, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "BASE")
    tokenizer.chat_template = None
    shutil.rmtree(tmp_path / "BASE")
    tokenizer.save_pretrained(tmp_path / "BASE")
    (tmp_path / "BASE" / "config.json").write_text("{}")
    write(tmp_path / "rows.jsonl", PAIRS)
    assert call("init", tmp_path, "--model", tmp_path / "BASE")[0] == 0
    assert read_run_config(tmp_path / "merit.yml").data.chat_template == "plain"


@pytest.mark.parametrize(
    "files,datasets",
    [
        (["a_train.jsonl", "a_test.jsonl"], {"a": ("a_train.jsonl", "a_test.jsonl")}),
        (["a.jsonl", "a-heldout.parquet"], {"a": ("a.jsonl", "a-heldout.parquet")}),
        (["a.jsonl", "a_held_out.jsonl"], {"a": ("a.jsonl", "a_held_out.jsonl")}),
        (["test_a.jsonl", "train_a.jsonl"], {"a": ("train_a.jsonl", "test_a.jsonl")}),
        (["train.jsonl", "dev.jsonl"], {"root": ("train.jsonl", "dev.jsonl")}),
        (["x/a.jsonl", "y/a.jsonl"], {"x-a": ("x/a.jsonl", None), "y-a": ("y/a.jsonl", None)}),
        (["a.parquet", "a.jsonl"], {"a": ("a.jsonl", None)}),
        (["contest.jsonl"], {"contest": ("contest.jsonl", None)}),
        (["a b.jsonl", "val/a b.jsonl"], {"a-b": ("a b.jsonl", "val/a b.jsonl")}),
        (
            ["out/split/stage.json", "out/rows.jsonl", ".hidden/b.jsonl", "a.jsonl"],
            {"a": ("a.jsonl", None)},
        ),
    ],
)
def test_names_and_pairs(tmp_path, files, datasets):
    root = tmp_path / "root"
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("")
    found = {
        candidate.name: tuple(
            path and str(path.relative_to(root)) for path in (candidate.path, candidate.eval_path)
        )
        for candidate in scan([root]).candidates
    }
    assert found == datasets


def test_more_than_a_dozen_datasets_are_one_folder(call, tmp_path):
    for i in range(14):
        rows = [{"prompt": f"{i} {j}?", "completion": str(j)} for j in range(100)]
        write(tmp_path / "tasks" / f"task{i:02}.jsonl", rows)
    assert call("init", tmp_path)[0] == 0
    text = (tmp_path / "merit.yml").read_text()
    assert yaml.safe_load(text)["mixture"] == [{"folder": "tasks", "eval_share": 0.1}]
    assert "# task03: 100 rows (prompt and completion)" in text
    config = read_run_config(tmp_path / "merit.yml", ["model=BASE"])
    assert [entry.name for entry in config.mixture] == [f"task{i:02}" for i in range(14)]
    assert {entry.eval_share for entry in config.mixture} == {0.1}
