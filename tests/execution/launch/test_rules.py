"""Bad options are one line and write nothing; secrets never reach a file."""

from pathlib import Path

import pytest
from support.execution.launches import CONFIG, OPTIONS, write_config

GPUS = {"sky": ["--accelerator", "H100"], "hf-jobs": ["--accelerator", "h200x8"]}
VALUES = {
    "--gpus": "8",
    "--accelerator": "h200x8",
    "--cpus": "4",
    "--workers": "2",
    "--time": "12h",
    "--partition": "a100",
    "--image": "reg/merit:1",
    "--install": "merit_fast",
    "--storage": "claim",
    "--scratch": "/local/run",
    "--secret": "hub-token",
}
STORED = ("--storage", "--scratch")
READ = {
    "shell": {"--gpus", "--workers"},
    "slurm": {*("--gpus", "--cpus", "--workers", "--time", "--partition"), *STORED},
    "sky": {*("--gpus", "--accelerator", "--cpus", "--image", "--install", "--secret"), *STORED},
    "ray": {"--gpus", "--workers", "--image", "--install", *STORED},
    "k8s-job": {*("--gpus", "--cpus", "--workers", "--time", "--image", "--secret"), *STORED},
    "hf-jobs": {*("--gpus", "--accelerator", "--time", "--image", "--secret"), *STORED},
}


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """A run's YAML, run.yml, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_config(Path("run.yml"))
    return tmp_path


@pytest.fixture
def refused(call, plain):
    """The error of a launch that must be refused and write nothing."""

    def refused(*words):
        before = sorted(plain.rglob("*"))
        code, shown, error = call("launch", *words, "--out", "jobs")
        assert (code, shown) == (2, "") and sorted(plain.rglob("*")) == before
        assert error.count("\n") == 1
        return error.removeprefix("error: ").strip()

    return refused


@pytest.mark.parametrize("target", READ)
def test_an_option_that_the_target_does_not_read_is_refused(refused, target):
    for flag, value in VALUES.items():
        if flag in READ[target]:
            continue
        error = refused("run.yml", "--to", target, *OPTIONS[target], flag, value)
        flags = error.removeprefix(f"command line: {flag}: --to {target} reads ")
        assert set(flags.split(", ")) == READ[target], error


@pytest.mark.parametrize("target", ["sky", "k8s-job", "hf-jobs"])
def test_an_option_that_the_target_needs_is_named(refused, target):
    options = OPTIONS[target]
    for i in range(0, len(options), 2):
        rest = options[:i] + options[i + 2 :]
        error = refused("run.yml", "--to", target, *rest)
        assert error.startswith("command line: --") and options[i] in error
        assert f"--to {target} needs" in error


@pytest.mark.parametrize(
    "words, error",
    [
        (["--gpus", "0"], "--gpus: must be at least 1, got 0"),
        (["--time", "90"], "--time: must be such as 90m, 12h or 2d, got '90'"),
        (["--time", "0h"], "--time: must be such as 90m, 12h or 2d, got '0h'"),
        (["--partition", "a b"], "--partition: must be letters, digits"),
        (["--partition", "a\n#SBATCH --wrap=x"], "--partition: must be letters, digits"),
    ],
)
def test_a_bad_value_is_one_line(refused, words, error):
    assert refused("run.yml", "--to", "slurm", *words).startswith(f"command line: {error}")


def test_gpus_and_flavor_must_agree(refused):
    options = ["--to", "hf-jobs", *OPTIONS["hf-jobs"]]
    error = refused("run.yml", *options, "--gpus", "4", "--accelerator", "h200x8")
    assert error == "command line: --gpus: must be 8, those of the flavor h200x8, got 4"
    assert "got only one" in refused("run.yml", *options, "--gpus", "4")


@pytest.mark.parametrize("target", ["slurm", "ray", "k8s-job"])
def test_a_dtype_that_machines_would_choose_is_refused(refused, call, target):
    write_config(Path("run.yml"), split={"dtype": "auto"}, evaluate={"dtype": "auto"})
    error = refused("run.yml", "--to", target, *OPTIONS[target])
    assert error.startswith("split.dtype, evaluate.dtype: must be bf16 or fp32")
    fixed = ["split.dtype=bf16", "evaluate.dtype=bf16"]
    assert error.endswith(" ".join(fixed))
    assert call("launch", "run.yml", "--to", target, *OPTIONS[target], *fixed)[0] == 0
    assert call("launch", "run.yml", "--to", "shell")[0] == 0  # one machine, one choice


@pytest.mark.parametrize("target", ["sky", "k8s-job", "hf-jobs"])
def test_paths_outside_of_the_storage_are_refused(refused, target):
    options = ["--to", target, *OPTIONS[target]]
    error = refused("run.yml", *options, "output=/elsewhere/runs")
    assert error.startswith("output: must lie in the current folder")
    error = refused("run.yml", *options, "model=/elsewhere/base")
    assert error.startswith("model: must lie in the current folder")
    write_config(Path("run.yml"), train={"engine_config": "../recipe.yml", "engine": "trl"})
    assert refused("run.yml", *options).startswith("train.engine_config: must lie in")


def test_a_model_of_the_hub_needs_no_storage(call, plain):
    words = ["--to", "k8s-job", *OPTIONS["k8s-job"], "model=org/base"]
    assert call("launch", "run.yml", *words)[0] == 0


def test_a_file_of_someone_else_stays(call, plain):
    Path("jobs").mkdir()
    Path("jobs/run.sh").write_text("#!/bin/bash\n")
    code, _, error = call("launch", "run.yml", "--to", "shell", "--out", "jobs")
    assert (code, error) == (
        2,
        "error: jobs/run.sh: is there, and merit-fast launch did not make it\n",
    )
    assert Path("jobs/run.sh").read_text() == "#!/bin/bash\n"


def test_files_of_an_earlier_launch_do_not_stay(call, plain):
    Path("jobs").mkdir()
    Path("jobs/notes.yaml").write_text("mine: 1\n")
    assert call("launch", "run.yml", "--to", "slurm", "--out", "jobs")[0] == 0
    assert call("launch", "run.yml", "--to", "shell", "--out", "jobs")[0] == 0
    assert {file.name for file in Path("jobs").iterdir()} == {"notes.yaml", "run.sh"}


SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnop",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENG",
    "WANDB_API_KEY": "0123456789abcdef0123",
}


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("target", OPTIONS)
def test_no_file_holds_a_secret(call, plain, secrets, target):
    words = ["--to", target, *OPTIONS[target], "--gpus", "8", *GPUS.get(target, [])]
    names = ["hub-keys"] if target == "k8s-job" else list(SECRETS)
    if "--secret" in READ[target]:
        words += [word for name in names for word in ("--secret", name)]
    code, shown, error = call("launch", "run.yml", *words)
    assert code == 0, error
    assert not any(value in shown + error for value in SECRETS.values())
    if "--secret" in READ[target]:
        assert all(name in shown for name in names)


@pytest.mark.parametrize("target", OPTIONS)
def test_a_secret_on_the_command_line_is_refused(refused, secrets, target):
    """Where a value of the run's YAML is a secret, too: the command line is in every file."""
    value = SECRETS["HF_TOKEN"]
    error = refused("run.yml", "--to", target, *OPTIONS[target], f"output=runs/{value}")
    assert "would hold the value of HF_TOKEN" in error and value not in error


def test_a_secret_in_place_of_its_name_is_refused(refused, secrets):
    options = ["--to", "sky", *OPTIONS["sky"]]
    error = refused("run.yml", *options, "--secret", f"HF_TOKEN={SECRETS['HF_TOKEN']}")
    assert error == "command line: --secret: must be the name of a variable, without its value"


def test_the_yaml_is_needed(call, project):
    assert call("launch", "split.groups=2", "--to", "shell")[0] == 2
    assert call("launch", CONFIG, "--to", "nowhere")[0] == 2
