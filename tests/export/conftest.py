"""Split runs on rows of every format, and the command that exports their groups."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from support.runs import run_values

from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run
from merit_fast.progress import SilentProgress

FACTS = [("capital of France", "Paris"), ("two plus two", "four"), ("colour of snow", "white")]
PAIRS = [(f"{question} {i}?", f"{answer} {i}") for i in range(4) for question, answer in FACTS]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def chat(question, answer, **more):
    return {"messages": [turn("user", question), turn("assistant", answer, **more)]}


def sharegpt(i, question, answer):
    turns = [("human", question), ("gpt", answer), ("human", "sure?"), ("gpt", "yes")]
    conversations = [{"from": role, "value": text} for role, text in turns]
    return {"id": f"own-{i}", "system": "Be brief.", "conversations": conversations}


def marked(question, answer):
    answers = [("yes", True), ("unsure", False), (answer, True)]
    turns = [[turn("user", question), turn("assistant", a, train=mark)] for a, mark in answers]
    return {"messages": [message for pair in turns for message in pair]}


def write_mixture(folder: Path, with_marks: bool) -> list[dict]:
    """Datasets of every format; lines are written with odd spaces, to see whether they stay."""
    folder.mkdir()
    lines = [json.dumps(chat(*pair), separators=(" , ", ":  ")) + "  \r\n" for pair in PAIRS]
    (folder / "chat.jsonl").write_text("\n".join(lines), newline="")
    rows = [sharegpt(i, *pair) for i, pair in enumerate(PAIRS)]
    (folder / "shared.json").write_text(json.dumps(rows, indent=1))
    table = "instruction,output\n" + "".join(f'"{a}","{b}"\n' for a, b in PAIRS)
    (folder / "alpaca.csv").write_text(table)
    sides = pyarrow.Table.from_pylist([{"question": a, "answer": b} for a, b in PAIRS])
    pyarrow.parquet.write_table(sides, folder / "sides.parquet")
    names = ["chat.jsonl", "shared.json", "alpaca.csv", "sides.parquet"]
    if with_marks:
        text = "".join(json.dumps(marked(*pair)) + "\n" for pair in PAIRS)
        (folder / "marked.jsonl").write_text(text)
        names.append("marked.jsonl")
    return [
        {"name": name.partition(".")[0], "path": str(folder / name), "eval_share": 0.3}
        for name in names
    ]


def split_run(folder: Path, model: Path, mixture: list[dict], **sections) -> Path:
    values = run_values(model, mixture) | {"output": "out", **sections}
    values["split"]["tolerance"] = 1.0
    values["train"] |= {"controls": {}}
    config = folder / "run.yml"
    config.write_text(yaml.safe_dump(values))
    run = Run(read_run_config(config), SilentProgress())
    run.sketch()
    run.split()
    return config


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("plain")
    return split_run(folder, tiny_model, write_mixture(folder / "data", False))


@pytest.fixture(scope="session")
def marked_run(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("marked")
    return split_run(folder, tiny_model, write_mixture(folder / "data", True))


@pytest.fixture
def export(call, tmp_path):
    def run(config, stack, *flags):
        out = tmp_path / "groups"
        code, output, error = call(
            "export", str(config), "--format", stack, "--out", str(out), "--json", *flags
        )
        assert code == 0, error
        return out, json.loads(output)

    return run


@pytest.fixture(scope="session")
def pairs() -> list[tuple[str, str]]:
    """Questions and answers, one of each in every dataset."""
    return PAIRS
