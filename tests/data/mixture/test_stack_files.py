"""Files of axolotl and LLaMA-Factory become entries of a mixture."""

import json

import pytest
import yaml
from support.data.mixtures import entries, message
from support.data.rows import write

from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.data.rows.reader import RowReader
from merit_fast.data.sources import Source, read_rows


def messages(entry: DatasetConfig, **data):
    """The conversations of an entry as (role, content), and the tools of the first."""
    reader = RowReader(entry, DataConfig(**data))
    source = Source(entry.path, entry.split)
    return [
        [(turn.role, turn.content) for turn in reader.read(row, place).messages]
        for place, row in read_rows(source)
    ]


# ---- axolotl
CHAT = {"dialog": [{"who": "asker", "text": "a?"}, {"who": "bot", "text": "b"}]}


def axolotl(folder, **values):
    (folder / "axolotl.yml").write_text(
        yaml.safe_dump({"base_model": "x", "learning_rate": 1e-5, **values})
    )
    return [{"from": "axolotl.yml"}]


def test_an_axolotl_list_is_read_as_it_is(tmp_path):
    write(tmp_path / "chat.jsonl", [CHAT])
    write(tmp_path / "alpaca.jsonl", [{"instruction": "a?", "output": "b"}])
    write(tmp_path / "own.jsonl", [{"q": "a?", "a": "b"}])
    chat = {
        "path": "chat.jsonl",
        "type": "chat_template",
        "field_messages": "dialog",
        "message_property_mappings": {"role": "who", "content": "text"},
        "roles": {"assistant": ["bot"], "user": ["asker"]},
        "roles_to_train": ["bot"],
        "train_on_eos": "turn",
        "ds_type": "json",
    }
    own = {"field_instruction": "q", "field_output": "a", "format": "[INST] {instruction} [/INST]"}
    found = entries(
        tmp_path,
        axolotl(
            tmp_path,
            datasets=[
                chat,
                {"path": "alpaca.jsonl", "type": "alpaca"},
                {"path": "own.jsonl", "type": own},
                {"path": "org/hub", "name": "main", "split": "train[:5%]", "revision": "v1"}
                | {"type": "chat_template"},
            ],
            val_set_size=0.05,
        ),
    )
    assert list(found) == ["chat", "alpaca", "own", "hub-main"]
    for name in ("chat", "alpaca", "own"):
        assert messages(found[name]) == [[("user", "a?"), ("assistant", "b")]], name
    assert found["chat"].train_on == "all" and "prose prompt" in found["alpaca"].note
    hub = found["hub-main"]
    assert (hub.path, hub.config, hub.split, hub.revision) == (
        "org/hub",
        "main",
        "train[:5%]",
        "v1",
    )
    assert {entry.eval_share for entry in found.values()} == {0.05}


def test_axolotl_test_datasets_are_held_out(tmp_path):
    write(tmp_path / "a.jsonl", [CHAT])
    write(tmp_path / "t.jsonl", [CHAT])
    kind = {"type": "chat_template", "field_messages": "dialog"}
    data = [{"path": "a.jsonl", **kind}]
    (entry,) = entries(
        tmp_path, axolotl(tmp_path, datasets=data, test_datasets=[{"path": "t.jsonl", **kind}])
    ).values()
    assert entry.eval_path == str(tmp_path / "t.jsonl")
    tests = [{"path": "t.jsonl", "type": "chat_template"} | {"field_messages": "other"}]
    told = message(tmp_path, axolotl(tmp_path, datasets=data, test_datasets=tests))
    assert told == "axolotl.yml: test_datasets[0]: must be read as its training rows are, " + (
        "got columns"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"type": "completion"}, "datasets[0].type: must be chat_template, alpaca or a mapping"),
        ({"type": "chat_template", "train_on_eos": "all"}, "datasets[0].train_on_eos: cannot be"),
        ({"type": "chat_template", "shards": 4}, "datasets[0].shards: cannot be honoured"),
        ({"type": "chat_template", "drop_system_message": True}, "drop_system_message: cannot be"),
        ({"type": "chat_template", "fild_messages": "m"}, "datasets[0].fild_messages: cannot be"),
        ({"type": "alpaca", "field_messages": "m"}, "datasets[0].field_messages: cannot be"),
        ({"type": "alpaca", "ds_type": "parquet"}, "datasets[0].ds_type: must agree with the name"),
    ],
)
def test_an_axolotl_key_without_effect_is_refused(tmp_path, values, expected):
    mixture = axolotl(tmp_path, datasets=[{"path": "a.jsonl", **values}])
    assert message(tmp_path, mixture).startswith("axolotl.yml: ")
    assert expected in message(tmp_path, mixture)


@pytest.mark.parametrize("key", ["train_on_inputs", "rl", "pretraining_dataset"])
def test_an_axolotl_run_of_another_kind_is_refused(tmp_path, key):
    datasets = [{"path": "a.jsonl", "type": "alpaca"}]
    told = message(tmp_path, axolotl(tmp_path, datasets=datasets, **{key: True}))
    assert told.startswith(f"axolotl.yml: {key}: cannot be honoured")


@pytest.mark.parametrize("keys", [{"reward_model": True}, {"dataset_exact_deduplication": True}])
def test_an_axolotl_key_that_changes_rows_is_refused(tmp_path, keys):
    told = message(tmp_path, axolotl(tmp_path, datasets=[{"path": "a", "type": "alpaca"}], **keys))
    assert told.startswith(f"axolotl.yml: {next(iter(keys))}: cannot be honoured")


def test_the_plan_names_the_template_that_axolotl_would_take(tmp_path):
    data = [{"path": "org/a", "type": "alpaca"}, {"path": "org/b", "type": "chat_template"}]
    run = axolotl(tmp_path, datasets=data, chat_template="chatml", eot_tokens=["<|im_end|>"])
    found = entries(tmp_path, run)
    expected = "axolotl's chat_template, eot_tokens: here data.chat_template decides"
    assert found["a"].note.endswith(f"; {expected}") and "prose" in found["a"].note
    assert found["b"].note == expected
    plain = axolotl(tmp_path, datasets=data[1:], chat_template="tokenizer_default")
    assert entries(tmp_path, plain)["b"].note is None


def test_files_that_axolotl_gives_to_a_reader_are_the_path(tmp_path):
    (tmp_path / "parts").mkdir()
    for name in ("parts/a.jsonl", "parts/b.jsonl", "c.jsonl"):
        write(tmp_path / name, [CHAT])
    kind = {"type": "chat_template", "field_messages": "dialog"}
    data = [
        {"path": "json", "data_files": "parts/a.jsonl", **kind},
        {"path": "json", "data_files": ["parts/b.jsonl", "c.jsonl"], "ds_type": "json", **kind},
    ]
    one, two = entries(tmp_path, axolotl(tmp_path, datasets=data)).values()
    assert (one.name, one.path) == ("a", str(tmp_path / "parts" / "a.jsonl"))
    assert (two.path, two.data_files) == (str(tmp_path), ("parts/b.jsonl", "c.jsonl"))
    told = message(tmp_path, axolotl(tmp_path, datasets=[{"path": "json", "type": "alpaca"}]))
    assert "datasets[0].data_files: must be a file or a list of them, got None" in told


def test_all_is_no_role_of_axolotl(tmp_path):
    data = [{"path": "org/a", "type": "chat_template", "roles_to_train": ["all"]}]
    told = message(tmp_path, axolotl(tmp_path, datasets=data))
    assert "datasets[0].roles_to_train: must be a list of roles, got ['all']" in told


# ---- LLaMA-Factory
def info(folder, **datasets):
    (folder / "dataset_info.json").write_text(json.dumps(datasets))
    return [{"from": "dataset_info.json"}]


def test_columns_of_llamafactory_replace_every_default(tmp_path):
    rows = [{"instruction": "a?", "input": "unread", "output": "b", "q": "c?", "system": "s"}]
    write(tmp_path / "rows.jsonl", rows)
    mixture = info(
        tmp_path,
        plain={"file_name": "rows.jsonl"},
        trap={"file_name": "rows.jsonl", "columns": {"prompt": "q", "response": "output"}},
        full={
            "file_name": "rows.jsonl",
            "num_samples": 1,
            "columns": {"prompt": "q", "query": "input", "response": "output", "system": "system"},
        },
    )
    found = entries(tmp_path, mixture)
    read = {
        name: messages(entry, ignore_columns=("q", "instruction")) for name, entry in found.items()
    }
    assert read["plain"] == [[("user", "a?\nunread"), ("assistant", "b")]]
    assert read["trap"] == [[("user", "c?"), ("assistant", "b")]]
    assert read["full"] == [[("system", "s"), ("user", "c?\nunread"), ("assistant", "b")]]
    assert found["full"].sample == 1


def test_tags_and_images_of_llamafactory(tmp_path):
    turns = [{"role": "u", "content": "<image>what?"}, {"role": "a", "content": "a dot"}]
    write(tmp_path / "rows.jsonl", [{"messages": turns, "images": ["dot.png"]}])
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "u", "assistant_tag": "a"}
    columns = {"messages": "messages", "images": "images"}
    mixture = info(
        tmp_path,
        dots={
            "file_name": "rows.jsonl",
            "formatting": "sharegpt",
            "columns": columns,
            "tags": tags,
        },
        hub={"hf_hub_url": "org/x", "subset": "main", "formatting": "openai", "folder": "parts"},
    )
    found = entries(tmp_path, mixture)
    assert found["dots"].media == str(tmp_path)
    ((question, answer),) = messages(found["dots"])
    assert [part["type"] for part in question[1]] == ["image", "text"]
    assert answer == ("assistant", "a dot")
    assert (found["hub"].path, found["hub"].config) == ("org/x", "main")
    assert found["hub"].data_files == ("parts/**",)


def test_a_run_of_llamafactory_picks_its_datasets(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [{"instruction": "a?", "output": "b"}]
    for name in ("a", "b", "c"):
        write(tmp_path / "data" / f"{name}.jsonl", rows)
    info(tmp_path / "data", **{name: {"file_name": f"{name}.jsonl"} for name in ("a", "b", "c")})
    run = {"dataset": "a, c", "dataset_dir": "data", "max_samples": 7, "val_size": 0.1}
    (tmp_path / "train.yml").write_text(yaml.safe_dump({**run, "mask_history": True}))
    found = entries(tmp_path, [{"from": "train.yml"}])
    assert list(found) == ["a", "c"]
    a = found["a"]
    assert (a.path, a.max_examples) == (str(tmp_path / "data" / "a.jsonl"), 7)
    assert (a.eval_share, a.train_on) == (0.1, "last")
    held_out = {"dataset": "a", "eval_dataset": "b"}
    (tmp_path / "train.yml").write_text(yaml.safe_dump(held_out))
    (a,) = entries(tmp_path, [{"from": "train.yml"}]).values()
    assert a.eval_path == str(tmp_path / "data" / "b.jsonl")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", "dpo"),
        ("default_system", "be brief"),
        ("tool_format", "glm4"),
        ("enable_thinking", False),
    ],
)
def test_a_run_of_llamafactory_that_changes_rows_is_refused(tmp_path, key, value):
    info(tmp_path, a={"file_name": "a.jsonl"})
    run = {"dataset": "a", "dataset_dir": ".", key: value}
    (tmp_path / "train.yml").write_text(yaml.safe_dump(run))
    told = message(tmp_path, [{"from": "train.yml"}])
    assert told.startswith(f"train.yml: {key}: cannot be honoured")


def test_a_run_of_llamafactory_may_list_its_datasets(tmp_path):
    info(tmp_path, a={"file_name": "a.jsonl"}, b={"hf_hub_url": "org/b"})
    run = {"stage": "sft", "dataset": ["a", "b"], "dataset_dir": ".", "template": "qwen"}
    (tmp_path / "train.yml").write_text(yaml.safe_dump(run))
    found = entries(tmp_path, [{"from": "train.yml"}])
    assert found["a"].path == str(tmp_path / "a.jsonl"), "a file_name is never an id of the hub"
    assert found["b"].path == "org/b"
    note = "LLaMA-Factory's template qwen: here data.chat_template decides"
    assert {entry.note for entry in found.values()} == {note}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"file_name": "a.jsonl", "ranking": True}, "d.ranking: cannot be honoured"),
        ({"file_name": "a.jsonl", "columns": {"kto_tag": "label"}}, "d.columns.kto_tag: columns:"),
        ({"file_name": "a.jsonl", "columns": {"videos": "v"}}, "d.columns.videos: videos are not"),
        ({"file_name": "a.jsonl", "columns": {"promt": "q"}}, "d.columns.promt: cannot be"),
        ({"file_name": "a.jsonl", "formatting": "chatml"}, "d.formatting: must be one of alpaca"),
        ({"script_url": "x"}, "d.script_url: cannot be honoured"),
        ({"formatting": "alpaca"}, "d: must have file_name or hf_hub_url"),
    ],
)
def test_a_llamafactory_key_without_effect_is_refused(tmp_path, values, expected):
    told = message(tmp_path, info(tmp_path, d=values))
    assert told.startswith("dataset_info.json: d") and expected in told
