"""Exported rows are the ones that branches train, in files that readers of JSON lines accept."""

import datetime
import decimal
import json
import math

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from export.conftest import PAIRS, chat, split_run

from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.export.form import Form, free_names
from merit_fast.export.rows import PartRows
from merit_fast.export.survey import survey
from merit_fast.export.write import write_rows
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.progress import SilentProgress


@pytest.fixture(scope="module")
def chosen_run(tmp_path_factory, tiny_model):
    """Datasets with long, wrong, repeated, leaked and sampled rows, and one dealt to all groups."""
    folder = tmp_path_factory.mktemp("chosen")
    long = chat("what? " * 200, "long")
    wrong = {"messages": [{"role": "user", "content": "no answer"}]}
    rows = {
        "long": [chat(*PAIRS[0]), long, *(chat(*pair) for pair in PAIRS[1:]), long],
        "wrong": [wrong, *(chat(f"w {a}", b) for a, b in PAIRS)],
        "twice": [chat(f"t {a}", b) for a, b in (*PAIRS, *PAIRS)],
        "leaked": [chat(f"l {a}", b) for a, b in PAIRS],
    }
    for name, own in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in own)
        (folder / f"{name}.jsonl").write_text(text)
    held_out = folder / "leaked.test.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows["leaked"][:2]))
    further = {
        "long": {"eval_share": 0.2},
        "wrong": {"weight": 1.5},
        "twice": {"sample": 9},
        "leaked": {"eval_path": str(held_out)},
    }
    mixture = [
        {"name": name, "path": str(folder / f"{name}.jsonl"), **further[name]} for name in rows
    ]
    data = {"max_length": 64, "too_long": "drop", "bad_rows": 1, "leaks": "drop"}
    data["duplicates"] = "drop"
    return split_run(folder, tiny_model, mixture, data=data)


def test_the_rows_are_those_that_branches_train(export, chosen_run):
    out, report = export(chosen_run, "axolotl")
    config = read_run_config(chosen_run)
    outputs = Outputs(config, "")
    trained = RunData(outputs, SilentProgress())
    sizes = {"train": trained.train, "val": trained.load("eval")}
    for part, datasets in sizes.items():
        rows = [
            json.loads(line)
            for group in report["groups"]
            for name in group[part]
            for line in (out / name).read_text().splitlines()
        ]
        for dataset in datasets:
            own = [row for row in rows if row["dataset"] == dataset.name]
            texts = sorted(trained.tokenizer.decode(e.input_ids) for e in dataset.examples)
            template = trained.tokenizer.apply_chat_template
            exported = sorted(template(row["messages"], tokenize=False).strip() for row in own)
            assert exported == [text.strip() for text in texts]
    names = {dataset.name: dataset.num_examples for dataset in trained.train}
    assert names["wrong"] == 18 and names["twice"] == 9 and names["leaked"] == 10
    tokens = sum(dataset.num_target_tokens for dataset in trained.train)
    assert sum(group["num_target_tokens"] for group in report["groups"]) == tokens
    assert config.mixture[0].name == "long" and names["long"] < len(PAIRS)


def part_of(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = DatasetConfig(name, str(path))
    ignored = DataConfig(ignore_columns=("id", "source"))
    return PartRows(entry, ignored, "train", tuple(range(len(rows))))


def test_columns_of_two_types_never_share_a_file(tmp_path):
    question = chat(*PAIRS[0])
    parts = {
        "number": part_of(tmp_path, "number", [{"id": 1, **question}]),
        "text": part_of(tmp_path, "text", [{"id": "a", **question}]),
        "more": part_of(tmp_path, "more", [{"id": 2, "source": {"page": 3}, **question}]),
        "equal": part_of(tmp_path, "equal", [{"id": 5, **question}, {"id": None, **question}]),
    }
    keys = {name: Form({}).key(survey([part])) for name, part in parts.items()}
    assert keys["number"] == keys["equal"]
    assert len(set(keys.values())) == 3


def test_values_that_json_lacks_are_written_so_that_every_reader_takes_them(tmp_path):
    row = {
        "question": "2+2?",
        "answer": "four",
        "score": math.nan,
        "price": decimal.Decimal("1.50"),
        "day": datetime.date(2026, 1, 2),
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d.parquet")
    ignored = DataConfig(ignore_columns=("score", "price", "day"))
    part = PartRows(DatasetConfig("d", str(tmp_path / "d.parquet")), ignored, "train", (0,))
    names = free_names([survey([part])])
    write_rows(tmp_path / "out.jsonl", [(part, Form({}))], names, tmp_path / "images")
    written = json.loads((tmp_path / "out.jsonl").read_text(), parse_constant=pytest.fail)
    expected = {"score": None, "price": "1.50", "day": "2026-01-02", "dataset": "d", "id": "d-0"}
    assert written == {"question": "2+2?", "answer": "four", **expected}


@pytest.mark.parametrize(
    ("stack", "model_key"),
    [("axolotl", "base_model"), ("llamafactory", "model_name_or_path"), ("trl", None)],
)
def test_the_users_keys_cannot_bring_groups_into_conflict(
    export, chosen_run, tmp_path, stack, model_key
):
    own = tmp_path / "own.yml"
    keys = {"output_dir": None, "hub_model_id": "me/model", "eval_strategy": "steps"}
    loss = {"train_on_inputs": True, "train_on_prompt": True, "completion_only_loss": False}
    own.write_text(yaml.safe_dump({**keys, **loss, "seed": 3}))
    out, report = export(chosen_run, stack, "--extend", str(own))
    for group in report["groups"]:
        config = yaml.safe_load((out / group["config"]).read_text())
        number = group["group"]
        assert config["output_dir"] == str(out / "models" / f"group_{number}")
        assert config["hub_model_id"] == f"me/model-group_{number}" and config["seed"] == 3
        assert config[model_key or "model_name_or_path"]
        is_kept = stack != "trl" and bool(group["val"])
        assert ("eval_strategy" in config) == is_kept
        refused = {"axolotl": "train_on_inputs", "llamafactory": "train_on_prompt"}
        assert refused.get(stack, "completion_only_loss") not in config
