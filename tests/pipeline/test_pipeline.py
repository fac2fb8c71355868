"""The whole run: resumes after kill -9 to the same bytes, repeats only what a change needs."""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from support.checks import tree_bytes
from support.paths import KILL_AT
from support.runs import MEASURED, Notes, run_all, run_values
from support.warm import run_python

from merit_fast.errors import MeritFastError
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run


@pytest.fixture
def config_file(tmp_path, tiny_model, tiny_mixture):
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(run_values(tiny_model, tiny_mixture)))
    return file


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tiny_model, tiny_mixture):
    """A finished run: its directory, which tests copy or only read, its config, its result."""
    directory = tmp_path_factory.mktemp("whole")
    config = directory / "run.yml"
    config.write_text(yaml.safe_dump(run_values(tiny_model, tiny_mixture)))
    with contextlib.chdir(directory):
        summary, fresh = run_all(config)
    assert fresh == set()
    return directory, config, summary


ALL_OUTPUTS = {"sketch", "split", "merged/merit", "merged/random", "evaluate", "report"} | {
    f"branches/{name}" for name in ("joint", "merit-0", "merit-1", "random-0", "random-1")
}


def test_a_second_run_does_nothing_and_a_change_repeats_only_what_depends_on_it(
    whole_run, tmp_path, monkeypatch
):
    directory, config_file, summary = whole_run
    shutil.copytree(directory / "out", tmp_path / "out")
    config_file = Path(shutil.copy(config_file, tmp_path))  # its output lies next to it
    monkeypatch.chdir(tmp_path)
    assert set(summary["arms"]) == {"base", "joint", "joint@0.5", "random", "merit"}
    assert set(summary["split"].values()) == {0, 1} and set(summary["split"]) == {
        "capitals", "codes", "plurals", "opposites"}  # fmt: skip
    assert summary["arms"]["joint"]["loss"] < summary["arms"]["base"]["loss"]
    assert summary["arms"]["merit"]["loss"] < summary["arms"]["base"]["loss"]
    assert summary["arms"]["base"]["displacement"] == 0.0
    assert summary["arms"]["joint@0.5"]["displacement"] == pytest.approx(
        summary["arms"]["joint"]["displacement"] / 2
    )
    tokens = {arm: result["num_target_tokens"] for arm, result in summary["arms"].items()}
    assert tokens["joint"] == tokens["merit"] == tokens["random"] > 0
    gain_by_hand(summary)
    before = tree_bytes(tmp_path / "out")
    again, fresh = run_all(config_file)
    assert fresh == ALL_OUTPUTS and tree_bytes(tmp_path / "out") == before
    assert again == json.loads(json.dumps(summary).replace(str(directory), str(tmp_path)))

    _, fresh = run_all(config_file, "merge.threads=1")
    assert fresh == ALL_OUTPUTS  # the bytes do not depend on it
    _, fresh = run_all(config_file, "merge.weights=uniform")
    assert fresh == ALL_OUTPUTS - {"merged/merit", "merged/random", "evaluate", "report"}
    _, fresh = run_all(config_file, "merge.weights=uniform", "evaluate.max_new_tokens=3")
    assert fresh == ALL_OUTPUTS - {"evaluate", "report"}


def gain_by_hand(summary):
    """Checks the gain: sum_k w_k L(branch k) - L(merge), with w from the branches' tokens."""
    for arm in ("merit", "random"):
        branches = [result for name, result in summary["branches"].items() if name.startswith(arm)]
        tokens = [branch["num_target_tokens"] for branch in branches]
        mean = sum(t * b["token_loss"] for t, b in zip(tokens, branches, strict=True)) / sum(tokens)
        assert summary["merging_gains"][arm] == pytest.approx(
            mean - summary["arms"][arm]["token_loss"]
        )
    assert summary["merging_gain"] == summary["merging_gains"]["merit"]


KILLS = [
    ("sketch.tmp/plurals.safetensors", 1),
    ("/split", 3),  # split.json and stage.json of split.tmp are written, the rename is missing
    ("branches/merit-1", 2),
    ("branches/merit-1$", 1),  # everything is written, the rename is missing
    ("joint.tmp/resume.safetensors", 2),
    ("merit.tmp/model-00002", 1),
    ("evaluate.tmp/joint.json", 1),
    ("evaluate.tmp/merit.items.safetensors", 1),  # between a model's two files: the JSON is missing
    ("report.tmp/report.html", 1),
]


@pytest.mark.process
@pytest.mark.slow
def test_kill_9_in_every_stage_then_resume_gives_the_same_bytes(whole_run, tmp_path, monkeypatch):
    whole, config_file, _ = whole_run
    broken = tmp_path / "broken"
    broken.mkdir()
    script = str(KILL_AT)
    for pattern, count in KILLS:
        command = [script, pattern, str(count), "run", str(config_file), "output=out", "--json"]
        result = run_python(command, cwd=broken)
        assert result.returncode == -signal.SIGKILL, (pattern, result.returncode, result.stderr)
    monkeypatch.chdir(broken)
    run_all(config_file, "output=out")
    assert not list(broken.rglob("*.tmp"))
    ignored = (*MEASURED, "evaluate.json", "config.yml")  # config.yml names the output's place
    assert tree_bytes(whole / "out", ignored) == tree_bytes(broken / "out", ignored)
    results = [json.loads((d / "out/evaluate/evaluate.json").read_text()) for d in (whole, broken)]
    assert without_timing(results[0]) == without_timing(results[1])


def without_timing(value):
    if isinstance(value, dict):
        return {
            k: without_timing(v)
            for k, v in value.items()
            if k not in ("train_s", "peak_memory_bytes")
        }
    return value


@pytest.mark.process
@pytest.mark.slow
def test_a_dataset_added_later_costs_its_own_sketch_even_after_kill_9(
    config_file, tmp_path, monkeypatch, tiny_mixture
):
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(config_file.read_text())
    config_file.write_text(yaml.safe_dump(values | {"mixture": tiny_mixture[:3]}))
    Run(read_run_config(config_file)).sketch()
    config_file.write_text(yaml.safe_dump(values))
    script = str(KILL_AT)
    for pattern in (
        "sketch.tmp/plurals.safetensors",
        "sketch.tmp/opposites.safetensors",
        "out/sketch$",
    ):
        result = run_python([script, pattern, "1", "sketch", str(config_file)])
        assert result.returncode == -signal.SIGKILL, (pattern, result.stderr)
    notes = Notes()
    run = Run(read_run_config(config_file), notes)
    run.sketch()
    run.split()
    fresh = Run(read_run_config(config_file, ["output=fresh"]))
    fresh.sketch()
    fresh.split()
    for stage in ("sketch", "split"):
        ignored = ("config.yml", "stage.json")  # they hold the name of the output
        assert tree_bytes(tmp_path / "out" / stage, ignored) == tree_bytes(
            tmp_path / "fresh" / stage, ignored
        )
    run = Run(read_run_config(config_file, ["data.max_length=999"]), notes)  # the same tokens
    run.sketch()
    assert "sketch: 4 of 4 datasets are as before, their sketches are reused" in notes.notes


@pytest.mark.process
@pytest.mark.parametrize("parts", [None, {"attention": "self_attn", "rest": "^(?!.*self_attn)"}])
def test_a_killed_sketch_keeps_every_dataset_that_the_next_config_leaves_as_it_was(
    config_file, tmp_path, monkeypatch, tiny_mixture, parts
):
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(config_file.read_text())
    values["split"]["parts"] = parts
    edited = tmp_path / "plurals.jsonl"
    text = Path(tiny_mixture[2]["path"]).read_text()
    edited.write_text(text)
    values["mixture"][2]["path"] = str(edited)
    config_file.write_text(yaml.safe_dump(values))
    last = f"sketch.tmp/{'parts/rest/' if parts else ''}opposites.safetensors"
    result = run_python([str(KILL_AT), last, "1", "sketch", str(config_file)])
    assert result.returncode == -signal.SIGKILL, result.stderr
    done = sketched_files(tmp_path / "out/sketch.tmp", "capitals", "codes")
    assert len(done) == 2 * (1 + len(parts or ()))

    edited.write_text(text.replace("mice", "mouses"))
    command = ["sketch", str(config_file), "split.batch_size=3"]
    result = run_python([str(KILL_AT), last, "1", *command])  # and once more
    assert result.returncode == -signal.SIGKILL, result.stderr
    notes = Notes()
    Run(read_run_config(config_file, ["split.batch_size=3"]), notes).sketch()
    assert "sketch: 3 of 4 datasets were finished by a run that was interrupted" in notes.notes[-1]
    assert sketched_files(tmp_path / "out/sketch", "capitals", "codes") == done
    Run(read_run_config(config_file, ["split.batch_size=3", "output=small"])).sketch()
    Run(read_run_config(config_file, ["output=large"])).sketch()
    for output, names in (("small", ("plurals", "opposites")), ("large", ("capitals", "codes"))):
        fresh = sketched_files(tmp_path / output / "sketch", *names)
        assert sketched_files(tmp_path / "out/sketch", *names) == fresh
    assert not list(tmp_path.rglob("*.tmp"))


def sketched_files(folder, *names):
    files = [file for name in names for file in folder.rglob(f"{name}.safetensors")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.process
def test_a_sketch_killed_before_its_rename_is_never_taken_for_that_of_another_config(
    config_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = ["sketch", str(config_file)]
    assert run_python([str(KILL_AT), "out/sketch$", "1", *command]).returncode == -signal.SIGKILL
    other = [*command, "split.seed=1"]
    killed = run_python([str(KILL_AT), "sketch.tmp/codes.safetensors", "1", *other])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out/sketch.tmp/stage.json").exists()
    Run(read_run_config(config_file)).sketch()
    Run(read_run_config(config_file, ["output=fresh"])).sketch()
    assert tree_bytes(tmp_path / "out/sketch", ("stage.json",)) == tree_bytes(
        tmp_path / "fresh/sketch", ("stage.json",)
    )


def test_a_stage_whose_input_is_absent_or_stale_names_the_command(
    config_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run = Run(read_run_config(config_file), command="merit-fast {stage} run.yml")
    for stage, missing in (
        ("split", "sketch"),
        ("train", "split"),
        ("evaluate", "split"),
        ("report", "split"),
    ):
        with pytest.raises(MeritFastError, match=f"run first: merit-fast {missing} run.yml"):
            getattr(run, stage)()
    run.sketch()
    stale = Run(
        read_run_config(config_file, ["split.seed=1"]), command="merit-fast {stage} run.yml"
    )
    with pytest.raises(MeritFastError, match="sketch: was made from another config or input"):
        stale.split()


def test_the_order_of_the_mixture_does_not_change_the_split(
    config_file, tmp_path, monkeypatch, tiny_model, tiny_mixture
):
    monkeypatch.chdir(tmp_path)
    groups = []
    for number, mixture in enumerate((tiny_mixture, tiny_mixture[::-1])):
        values = {**run_values(tiny_model, mixture), "output": f"out{number}"}
        config_file.write_text(yaml.safe_dump(values))
        run = Run(read_run_config(config_file))
        run.sketch()
        run.split()
        groups.append(run.outputs.split_manifest.group_of("merit"))
    assert groups[0] == groups[1]


def test_three_lines_of_python(config_file, tmp_path, monkeypatch):
    import merit_fast

    monkeypatch.chdir(tmp_path)
    summary = merit_fast.run(config_file, "train.controls={}", "evaluate.max_new_tokens=2")
    assert set(summary["arms"]) == {"base", "merit"}
    assert (tmp_path / summary["merged"] / "config.json").exists()
