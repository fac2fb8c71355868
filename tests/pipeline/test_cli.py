"""The command line: exit codes, one-line errors, stages from YAML and flags, the console script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.runs import run_values


@pytest.fixture
def config_file(tmp_path, tiny_model, tiny_mixture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(run_values(tiny_model, tiny_mixture)))
    return file


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["run", "nowhere.yml"], "error: nowhere.yml: does not exist"),
        (["run"], "run: needs a CONFIG.yml, or --model and --dataset"),
        (["report"], "report: needs a CONFIG.yml"),
        (
            ["run", "run.yml", "split.grops=2"],
            "run.yml with command line: split.grops: unknown key; did you mean groups?",
        ),
        (["run", "run.yml", "other.yml"], "must be one CONFIG.yml"),
        (
            ["run", "run.yml", "model=/nowhere"],
            "model: /nowhere: must be a model's folder or a hub id; it is not there",
        ),
        (
            ["run", "run.yml", "model=org/name"],
            "model: org/name: not a folder, and the hub is switched off (HF_HUB_OFFLINE)",
        ),
        (["run", "run.yml", "output=run.yml"], "output: must be a directory, got the file run.yml"),
        (
            ["sketch", "--proj-dim", "100", "run.yml"],
            "split.proj_dim: must be a multiple of 4096, got 100",
        ),
        (["split", "--frobnicate"], "command line: unrecognized arguments: --frobnicate"),
        (["train"], "train: needs a CONFIG.yml, or --model and --dataset"),
        (["sketch", "--model", "m", "--dataset", "capitals"], "--dataset: must be NAME=PATH"),
        (["merge", "--model", "a"], "needs exactly one OUT directory"),
        (["merge", "out", "--model", "a:x"], "must be DIR or DIR:WEIGHT, got 'a:x'"),
        (
            ["merge", "out", "--model", "a:1", "--model", "b"],
            "give a weight to every model or to none",
        ),
        (["merge", "out", "--model", "nowhere:1"], "nowhere: is not a directory"),
        (
            ["merge", "out", "--model", "nowhere", "--threads", "0"],
            "threads: must be at least 1, got 0",
        ),
        (["merge", "out", "--model", "a:1", "--share", "0/2"], "--share: must be I/N"),
        (["merge", "out", "--model", "a:1", "--shard", "3/2"], "--share: must be I/N"),
        (
            ["merge", "out", "--model", "a:1", "--settings-per-model", "[{wieght: 1}]"],
            "models[0].wieght: unknown key; did you mean weight?",
        ),
        (["merge", "out", "--model", "a:1", "--models", "b"], "unrecognized arguments: --models b"),
        (["frobnicate"], "command line: no such command: 'frobnicate'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(call, config_file, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and message in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not Path("out").exists()


def test_broken_data_names_file_and_line(call, config_file, tmp_path):
    values = yaml.safe_load(config_file.read_text())
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    values["mixture"][0]["path"] = str(bad)
    config_file.write_text(yaml.safe_dump(values))
    code, _, err = call("run", config_file)
    assert code == 2 and "bad.jsonl:2" in err and len(err.strip().splitlines()) <= 2


def test_failure_is_exit_code_1_and_debug_shows_the_traceback(call, config_file):
    code, _, err = call("split", config_file)
    assert code == 1 and "run first: merit-fast sketch" in err and "Traceback" not in err
    code, _, err = call("split", config_file, "--debug")
    assert code == 1 and "Traceback" in err


def test_stages_one_by_one_equal_run(call, config_file, tmp_path, monkeypatch):
    for stage in ("sketch", "split", "train", "merge", "evaluate", "report"):
        code, out, err = call(stage, config_file, "--json")
        assert code == 0, err
        assert json.loads(out)["up_to_date"] is False
    code, out, _ = call("run", config_file, "--json")
    assert code == 0
    result = json.loads(out)
    assert {"base", "joint", "random", "merit"} <= set(result["arms"])
    assert {"loss", "exact_match", "text_loss"} <= set(result["arms"]["merit"])
    assert Path(result["report"]).exists() and isinstance(result["merging_gain"], float)
    code, out, _ = call("train", config_file, "--json")
    assert json.loads(out)["up_to_date"] is True
    code, out, _ = call("run", config_file)
    assert code == 0 and "merging" in out and "report.html" in out
    monkeypatch.chdir("/")  # the config next to an output replays it from any directory
    for stage in ("sketch", "train", "report"):
        code, out, err = call(stage, tmp_path / "out" / "split" / "config.yml", "--json")
        assert (code, json.loads(out)["up_to_date"]) == (0, True), err


def test_stages_from_flags_alone(call, tmp_path, monkeypatch, tiny_model, tiny_mixture):
    monkeypatch.chdir(tmp_path)
    common = ["--model", tiny_model, "--output", "flags", "--json"]
    for entry in tiny_mixture:
        common += ["--dataset", f"{entry['name']}={entry['path']},{entry['eval_path']}"]
    assert call("sketch", *common, "--examples", "4", "--proj-dim", "4096")[0] == 0
    code, _, err = call("split", *common, "--examples", "4", "--proj-dim", "4096", "--groups", "2")
    assert code == 0, err
    split = json.loads(Path("flags/split/split.json").read_text())
    assert {row["name"] for row in split["datasets"]} == {entry["name"] for entry in tiny_mixture}


def test_run_takes_model_datasets_and_output_without_a_yaml(
    call, tmp_path, monkeypatch, tiny_model, tiny_mixture
):
    monkeypatch.chdir(tmp_path)
    words = ["--model", tiny_model, "--output", "flags", "--json", "split.groups=1"]
    words += ["split.examples=4", "split.proj_dim=4096", "evaluate.interpolate=[]"]
    words += ["evaluate.max_new_tokens=1", "train.batch_size=8"]
    entry = tiny_mixture[0]
    words += ["--dataset", f"{entry['name']}={entry['path']},{entry['eval_path']}"]
    code, out, err = call("run", *words)
    assert code == 0, err
    assert Path(json.loads(out)["report"]) == Path("flags/report/report.html")
    (tmp_path / "my.yml").write_text("output: elsewhere\n")
    code, out, err = call("run", "my.yml", *words)  # flags override the YAML
    assert code == 0 and not Path("elsewhere").exists(), err


def test_merge_of_given_models(call, config_file, tmp_path, tiny_model):
    code, out, err = call(
        "merge", "merged", "--model", f"{tiny_model}:1", "--model", f"{tiny_model}:3", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["weights"] == [0.25, 0.75]
    for file in tiny_model.glob("*.safetensors"):
        assert file.read_bytes()[-1000:] == (tmp_path / "merged" / file.name).read_bytes()[-1000:]
    scaled = ["--model", f"{tiny_model}:1", "--scale", "0.5"]
    code, out, err = call("merge", "merged", *scaled, "--base", tiny_model, "--dry-run")
    assert code == 0 and "planned" in out and "(coefficient +0.500000)" in out, err
    code, _, err = call("merge", "merged", *scaled)
    assert code == 2 and "needs a base model" in err
    code, _, err = call("merge", config_file, "--dry-run")
    assert code == 2 and "--validation, --arm, --seed-index, --quorum and --grace go with" in err
    code, _, err = call("merge", "merged", *scaled, "--verify")
    assert code == 2 and "--verify and --overwrite go with a CONFIG.yml" in err
    same = ("merge", "again", "--model", tiny_model, "--model", tiny_model)
    code, _, err = call(*same, "--weights", "tokens")
    assert code == 2 and "no branch.json" in err and "give --weights as" in err
    assert not Path("again").exists()
    code, out, err = call(*same)
    assert code == 0 and "equal, because no model has a branch.json" in out, err
    code, _, err = call("merge", tiny_model, "--model", f"{tiny_model}:1")
    assert code == 2 and "must not be one of the inputs" in err
    (tmp_path / "mine").mkdir()
    code, _, err = call("merge", "mine", "--model", f"{tiny_model}:1")
    assert code == 2 and "is not an output of merit-fast" in err


def test_doctor_lists_every_op(call):
    code, out, _ = call("doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["native"]["simd_level"] in (
        "generic",
        "avx2",
        "avx512",
        "avx512_bf16",
    )
    assert {row["op"] for row in report["ops"]} >= {
        "weighted_average",
        "flat_sketch",
        "linear_grad_sketch",
    }
    assert call("doctor")[0] == 0


@pytest.mark.process
def test_console_script_from_another_directory(tmp_path):
    script = Path(sys.executable).with_name("merit-fast")
    result = subprocess.run(
        [script, "doctor", "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["native"]["built"] is True
    result = subprocess.run(
        [script, "run", "nope.yml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (2, "error: nope.yml: does not exist\n")
