"""The paper's settings in examples/paper, with stand-ins for models and data."""

import json
import re
import runpy
import shutil
import sys

import pytest
from support.docs.pages import ROOT
from support.tiny import chat_row, make_model, make_tokenizer
from support.vision.models import make_vision_model

from bench.vision.digits import TASKS, write_digit_tasks
from merit_fast.data.mixture.folder import folder_entries

PAPER = ROOT / "examples" / "paper"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A copy of examples/paper with data where its configurations look, and tiny models."""
    folder = tmp_path_factory.mktemp("paper") / "paper"
    shutil.copytree(PAPER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in folder.glob("*.yml"):  # few rows: a larger share of them, and a smaller sample
        text = re.sub(r"eval_share: [0-9.]+", "eval_share: 0.25", file.read_text())
        file.write_text(text.replace("sample: 10000", "sample: 30"))
    write_digit_tasks(folder / "made", num_train=24, num_eval=0)
    for tasks, images in (
        ("vision_flan/tasks", "vision_flan/images_191task_1k"),
        ("sources", "images"),
    ):
        (folder / tasks).mkdir(parents=True)
        (folder / images).symlink_to(folder / "made/images")
        for name in TASKS:
            lines = (folder / f"made/{name}.path.jsonl").read_text().splitlines()
            own = [json.loads(line) for line in lines]
            if tasks == "vision_flan/tasks":  # as the annotations of Vision-FLAN have it
                own = [row | {"task_name": f"digits+{name}"} for row in own]
            text = "".join(json.dumps(row) + "\n" for row in own)
            (folder / tasks / f"{name}.jsonl").write_text(text)
    (folder / "flan/train").mkdir(parents=True)
    rows = [
        {"inputs": f"{task} {i}?", "targets": str(i), "task": task}
        for task in ("add/1", "negate", "double", "halve", "square", "root")
        for i in range(60)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "flan/train/part.jsonl").write_text(lines)
    make_vision_model(folder / "VISION", "qwen2_5_vl")
    make_tokenizer(folder / "TEXT")
    make_model(folder / "TEXT")
    return folder


@pytest.fixture
def run_script(monkeypatch, capsys):
    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(PAPER / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ["vision_3b", "vision_7b"])
def test_vision(stand_ins, call, name):
    code, out, error = call(
        "run", stand_ins / f"{name}.yml", f"model={stand_ins / 'VISION'}", "--dry-run", "--json"
    )
    assert code == 0, error
    forecast = json.loads(out)
    assert forecast["groups"] == {"vision_3b": 8, "vision_7b": 4}[name]
    assert {stage["stage"] for stage in forecast["stages"]} >= {"sketch", "train", "merge"}
    sketch = next(stage for stage in forecast["stages"] if stage["stage"] == "sketch")
    assert 12 * len(TASKS) < sketch["rows"] < 24 * len(TASKS)


def test_text(stand_ins, call, run_script):
    printed = run_script(
        "split_tasks.py", stand_ins / "flan/train", stand_ins / "flan/tasks", "--by", "task"
    )
    names = ("add_1", "double", "halve", "negate", "root", "square")
    assert printed.splitlines() == [f"{60:8d} {name}" for name in names]
    model = f"model={stand_ins / 'TEXT'}"
    code, out, error = call("run", stand_ins / "text_3b.yml", model, "--dry-run", "--json")
    assert code == 0, error
    assert json.loads(out)["groups"] == 4


def test_rows_without_the_column_or_the_pattern_are_named(stand_ins, run_script, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"id": "coco_caption_1", **chat_row("a", "b", "c")}]))
    with pytest.raises(SystemExit, match=r"rows.json\[0\]: must have text in the column task"):
        run_script("split_tasks.py", file, tmp_path / "a", "--by", "task")
    with pytest.raises(SystemExit, match="id: must match"):
        run_script("split_tasks.py", file, tmp_path / "b", "--by", "id", "--pattern", "(x)$")
    run_script("split_tasks.py", file, tmp_path / "c", "--by", "id", "--pattern", "(.*)_[0-9]+$")
    row = json.loads((tmp_path / "c/coco_caption.jsonl").read_text())
    assert row == json.loads(file.read_text())[0]


def test_no_task_is_held_out_or_mixed_with_another_because_of_its_name(run_script, tmp_path):
    names = ["VisDA+photos_train", "VisDA+photos_validation", "digits_test", "dev-set", "tests"]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"task": name, **chat_row("a", "b", name)} for name in names]))
    run_script("split_tasks.py", file, tmp_path / "tasks", "--by", "task")
    entries = folder_entries(tmp_path / "tasks", "mixture")
    assert len(entries) == len(names) and not any("eval_path" in entry for entry in entries)
    rows = [{"task": name, **chat_row("a", "b", name)} for name in ("a+b", "a b")]
    file.write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match=r"rows.json\[1\]: task: 'a b' and 'a\+b' give one file"):
        run_script("split_tasks.py", file, tmp_path / "other", "--by", "task")


def test_the_table_is_what_the_formula_gives(run_script):
    assert run_script("estimate.py") in (PAPER / "README.md").read_text()
