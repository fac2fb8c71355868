"""Exported groups hold the rows as they came, in forms that the other stacks read."""

import json
from pathlib import Path

import pytest
import yaml
from support.runs import run_values
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_dataset
from trl.scripts.utils import DatasetMixtureConfig

from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer
from merit_fast.data.sources import Source, read_rows
from merit_fast.pipeline.config import read_run_config


def rows_of(out: Path, names: list[str]) -> list[dict]:
    return [json.loads(line) for name in names for line in (out / name).read_bytes().splitlines()]


def same_examples(entries: list[dict], config: Path, part: str, names: list[str]) -> bool:
    """Whether exported rows, read by ``entries``, give the examples of the run's datasets."""
    run = read_run_config(config)
    tokenizer = load_tokenizer(run.model)

    def examples(mixture, data, part):
        found = load_mixture(mixture, tokenizer, data, part=part)
        return sorted(
            (example.input_ids.tolist(), example.labels.tolist())
            for dataset in found
            for example in dataset.examples
        )

    own = [entry for entry in run.mixture if entry.name in names]
    exported = [DatasetConfig(**entry) for entry in entries]
    read = {entry["columns"]["messages"] for entry in entries}
    others = {"messages", "conversations", "instruction", "output", "question", "answer", "system"}
    ignored = ("dataset", "id", "merit_id", *sorted(others - read))
    data = DataConfig(ignore_columns=ignored)
    return examples(exported, data, "train") == examples(own, run.data, part)


@pytest.mark.parametrize("stack", ["axolotl", "llamafactory", "trl"])
def test_rows_are_there_once_and_byte_for_byte(export, plain_run, pairs, stack):
    out, report = export(plain_run, stack)
    lines = [
        line
        for group in report["groups"]
        for name in (*group["train"], *group["val"])
        for line in (out / name).read_bytes().split(b"\n")
        if line
    ]
    assert len(lines) == 4 * len(pairs)
    data = Path(read_run_config(plain_run).mixture[0].path).parent
    for line in (data / "chat.jsonl").read_bytes().split(b"\n"):
        if text := line.strip():
            [match] = [found for found in lines if found.startswith(text[:-1] + b", ")]
            row = json.loads(match)
            assert row["dataset"] == "chat" and row["messages"] == json.loads(text)["messages"]
    for name in ("shared.json", "alpaca.csv", "sides.parquet"):
        originals = [row for _, row in read_rows(Source(str(data / name)))]
        exported = [json.loads(line) for line in lines]
        exported = [row for row in exported if row["dataset"] == name.partition(".")[0]]
        assert len({row["merit_id"] for row in exported}) == len(pairs)
        for row in exported:
            number = int(row["merit_id"].rpartition("-")[2])
            assert originals[number].items() <= row.items()


def test_group_files_hold_the_datasets_of_the_split_and_its_weights(export, plain_run):
    out, report = export(plain_run, "axolotl")
    split = json.loads((plain_run.parent / "out/split/split.json").read_text())
    for group in report["groups"]:
        own = [row for row in split["datasets"] if row["group"] == group["group"]]
        names = {row["name"] for row in own}
        assert set(group["datasets"]) == names
        assert {row["dataset"] for row in rows_of(out, group["train"])} == names
        assert group["num_target_tokens"] == sum(row["num_target_tokens"] for row in own)
        assert group["train"][0] == f"train_{group['group']}.jsonl"
        assert group["val"][0] == f"val_{group['group']}.jsonl"
    assert sum(group["weight"] for group in report["groups"]) == pytest.approx(1)
    assert json.loads((out / "groups.json").read_text()) == report
    assert report["merge"].count("--model") == 2


def axolotl_entry(entry: dict, name: str) -> dict:
    """The same reading as an entry of a mixture: turns, words and marks."""
    assert entry["ds_type"] == "json" and entry["type"] == "chat_template"
    keys = entry["message_property_mappings"]
    columns = {"messages": entry["field_messages"], **keys}
    roles = {role: tuple(words) for role, words in entry.get("roles", {}).items()}
    return {"name": name, "path": entry["path"], "columns": columns, "roles": roles or None}


def test_axolotl_trains_the_same_tokens(export, marked_run):
    out, report = export(marked_run, "axolotl")
    for group in report["groups"]:
        config = yaml.safe_load((out / group["config"]).read_text())
        assert config["sequence_len"] == 2048 and config["learning_rate"] == 1e-3
        for key, part in (("datasets", "train"), ("test_datasets", "eval")):
            for i, entry in enumerate(config[key]):
                rows = rows_of(out, [Path(entry["path"]).name])
                names = sorted({row["dataset"] for row in rows})
                reading = [axolotl_entry(entry, f"d{i}")]
                if "message_field_training" in entry:
                    assert entry["message_field_training"] == "train"
                    marks = [m["train"] for row in rows for m in row[entry["field_messages"]]]
                    assert any(marks) and not all(marks)
                assert entry["roles_to_train"] == ["assistant"]
                assert same_examples(reading, marked_run, part, names)


def alpaca_and_sharegpt(info: dict, row: dict) -> list[tuple[str, str]]:
    """The turns of a row by the published rules of dataset_info.json."""
    columns = info["columns"]
    if info["formatting"] == "alpaca":
        asked = [row.get(columns.get(name)) for name in ("prompt", "query")]
        turns = [("user", "\n".join(filter(None, asked))), ("assistant", row[columns["response"]])]
    else:
        tags = info["tags"]
        words = {tags[f"{name}_tag"]: name for name in ("user", "assistant", "system")}
        found = row[columns["messages"]]
        turns = [(words[turn[tags["role_tag"]]], turn[tags["content_tag"]]) for turn in found]
    system = row.get(columns.get("system"))
    return [("system", system), *turns] if system else turns


def test_llamafactory_reads_the_same_turns(export, plain_run, pairs):
    out, report = export(plain_run, "llamafactory")
    info = json.loads((out / "dataset_info.json").read_text())
    seen = set()
    for group in report["groups"]:
        config = yaml.safe_load((out / group["config"]).read_text())
        assert config["dataset_dir"] == str(out) and config["stage"] == "sft"
        assert f"group_{group['group']}" in config["dataset"].split(",")
        for name in (*config["dataset"].split(","), *config["eval_dataset"].split(",")):
            for row in rows_of(out, [info[name]["file_name"]]):
                turns = alpaca_and_sharegpt(info[name], row)
                seen.add((row["dataset"], *turns))
    plain = {("user", a, "assistant", b) for a, b in pairs}
    for name in ("chat", "alpaca", "sides"):
        found = {row[1:] for row in seen if row[0] == name}
        assert found == {((a, b), (c, d)) for a, b, c, d in plain}
    shared = [row[1:] for row in seen if row[0] == "shared"]
    assert len(shared) == len(pairs)
    assert all(row[0] == ("system", "Be brief.") and len(row) == 5 for row in shared)


def test_trl_parses_the_configuration_and_loads_the_rows(export, plain_run, tmp_path):
    out, report = export(plain_run, "trl")
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    for group in report["groups"]:
        file = out / group["config"]
        values = yaml.safe_load(file.read_text()) | {"bf16": False, "use_cpu": True}
        file.write_text(yaml.safe_dump(values))
        _, training, model, mixture = parser.parse_args_and_config(
            ["--config", str(file)], fail_with_unknown_args=True
        )
        assert training.max_length == 2048 and model.model_name_or_path
        loaded = get_dataset(mixture)["train"]
        assert len(loaded) == group["num_rows"]
        is_messages = loaded.column_names == ["messages"]
        assert is_messages or loaded.column_names == ["prompt", "completion"]
        assert training.assistant_only_loss == is_messages
        roles = {m["role"] for row in loaded for m in row["messages" if is_messages else "prompt"]}
        assert roles <= {"system", "user", "assistant"}


@pytest.mark.parametrize(
    ("stack", "values", "gone"),
    [
        ("axolotl", {"val_set_size": 0.1, "adapter": "lora"}, "val_set_size"),
        ("llamafactory", {"dataset": "mine", "template": "qwen3", "val_size": 0.1}, "val_size"),
        ("trl", {"dataset_name": "mine", "use_peft": True}, "dataset_name"),
    ],
)
def test_the_users_own_keys_are_kept(export, plain_run, tmp_path, stack, values, gone):
    own = tmp_path / "own.yml"
    own.write_text(yaml.safe_dump(values | {"learning_rate": 5e-6, "output_dir": "models/x"}))
    out, report = export(plain_run, stack, "--extend", str(own))
    config = yaml.safe_load((out / report["groups"][0]["config"]).read_text())
    assert config["learning_rate"] == 5e-6 and config["output_dir"] == "models/x/group_0"
    kept = set(values) - {gone, "dataset"}
    assert all(config[key] == values[key] for key in kept)
    assert gone not in config and config.get("dataset") != "mine"


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (
            "llamafactory",
            "marked: llamafactory trains every answer or the last one, and these",
        ),
        ("trl", "marked: trl trains every answer of messages, and these rows mark"),
    ],
)
def test_marks_that_a_stack_cannot_follow_are_refused(call, marked_run, tmp_path, stack, message):
    out = str(tmp_path / "x")
    code, _, error = call("export", str(marked_run), "--format", stack, "--out", out)
    assert code == 2 and message in error.splitlines()[-1]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("key", "assignment"),
    [
        ("train.adapter.kind", "train.adapter={kind: lora}"),
        ("train.freeze", "train.freeze=[lm_head]"),
        ("train.patience", "train={evaluate_steps: 2, patience: 1}"),
    ],
)
def test_a_recipe_that_a_stack_would_not_follow_is_refused(
    call, plain_run, tmp_path, key, assignment
):
    out = str(tmp_path / "x")
    code, _, error = call("export", str(plain_run), assignment, "--format", "trl", "--out", out)
    assert code == 2 and f"{key}: must be absent for export" in error
    assert not (tmp_path / "x").exists()


def test_export_needs_a_split(call, tmp_path, tiny_model, tiny_mixture):
    config = tmp_path / "run.yml"
    config.write_text(yaml.safe_dump(run_values(tiny_model, tiny_mixture)))
    code, _, error = call("export", str(config), "--format", "trl", "--out", str(tmp_path / "x"))
    assert code != 0 and "run first: merit-fast split" in error
    assert not (tmp_path / "x").exists()
