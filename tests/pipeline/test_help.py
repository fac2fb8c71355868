"""Help texts of every command; ``merit-fast --version``; ``python -m merit_fast``."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import typing
from typing import Literal

import pytest

import merit_fast
from merit_fast.cli.commands import COMMANDS
from merit_fast.cli.flags import Parser, add_fields, assignments_of, options_of
from merit_fast.cli.overview import EXAMPLES
from merit_fast.errors import InputError
from merit_fast.manifests.stages import STAGES
from merit_fast.options.fields import option
from merit_fast.options.keys import sections
from merit_fast.options.parser import override, parse
from merit_fast.pipeline.config import RunConfig, read_run_config
from merit_fast.records import record


@pytest.fixture
def help_of(call, monkeypatch):
    """The help text of a command on a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")

    def help_of(*words):
        code, out, err = call(*words, "--help")
        assert (code, err) == (0, "")
        return out

    return help_of


def test_the_overview_lists_every_command_with_its_purpose(help_of):
    text = help_of()
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.purpose)}$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 100


def test_an_unknown_command_names_the_nearest(call):
    assert "no such command: 'merg'; did you mean merge?" in call("merg")[2]
    assert f"commands: {', '.join(COMMANDS)}" in call("xyzzy")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_readable_and_has_an_example(help_of, command):
    text = help_of(command)
    assert f"\nexample:\n  merit-fast {command}" in text
    assert max(map(len, text.splitlines())) <= 100
    assert " ".join(COMMANDS[command].purpose.split()) in " ".join(text.split())
    assert not re.search(r"\b[A-Z]\w+\([\w=]*", text), "the repr of a dataclass"
    assert not re.search(r"default:\s+(None|True|False|\(|\[|\{)", text), "a Python value"
    assert "--json" in text and "--debug" in text


@pytest.mark.parametrize("command", [name for name in EXAMPLES if name in COMMANDS])
def test_the_example_of_a_command_is_one_that_it_reads(command):
    program, name, *words = shlex.split(EXAMPLES[command])
    assert (program, name) == ("merit-fast", command)
    parser = Parser(command, "")
    assert callable(COMMANDS[command].add_arguments(parser))
    parser.add_argument("--json", action="store_true")
    parser.parse_intermixed_args(words)


def words_of(hint):
    if typing.get_origin(hint) is Literal:
        return list(map(str, typing.get_args(hint)))
    return [word for inner in typing.get_args(hint) for word in words_of(inner)]


@pytest.mark.parametrize(
    "stage", [stage for stage in STAGES if stage.options], ids=lambda s: s.name
)
def test_help_shows_every_choice_and_flag_of_a_stage(help_of, stage):
    options = options_of(stage)
    text = help_of(stage.name)
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        flag = field.metadata.get("flag") or "--" + field.name.replace("_", "-")
        section = re.split(rf"^  {flag}(?=[ ,\n])", text, flags=re.MULTILINE)
        assert len(section) == 2, flag
        shown = re.split(r"^  --", section[1], maxsplit=1, flags=re.MULTILINE)[0]
        for word in words_of(hints[field.name]):
            assert re.search(rf"(?<![\w-]){word}(?![\w-])", shown), (flag, word)


def test_the_help_of_run_lists_every_key_and_ends_with_a_yaml_that_run_reads(help_of, tmp_path):
    text = help_of("run")
    keys, _, example = text.partition("an example of CONFIG.yml")
    for section, entries in sections(RunConfig):
        assert f"\n  {section or 'top level'}:\n" in keys
        for name, form, help in entries:
            shown = re.search(rf"^    {re.escape(f'{name} {form}')}(.*)", keys, re.MULTILINE)
            assert shown, name
            assert " ".join(help.split()) in " ".join(keys.split()), name
    for section in ("split", "train", "merge", "evaluate"):
        for field in dataclasses.fields(getattr(RunConfig, section)):
            assert re.search(rf"^    {field.name}[ .]", keys, re.MULTILINE), field.name
    assert "usually 0.2 to 0.5" in keys
    lines = [line[2:] for line in example.splitlines()[1:]]
    (tmp_path / "my.yml").write_text("\n".join(lines))
    config = read_run_config(tmp_path / "my.yml")
    assert [entry.name for entry in config.mixture] == ["facts", "code"]
    assert config.output == str(tmp_path / "runs/mine")


def test_the_settings_of_each_model_have_a_flag_of_their_own(help_of):
    text = help_of("merge")
    assert "--settings-per-model" in text and "--model " in text
    assert not re.search(r"--models\b", text)


# ---- flags of any config
@record
class Inner:
    weight: float = option(1.0, "a weight")


@record
class Config:
    count: int = option(3, "a number of things")
    rate: float | None = option(None, "a rate")
    mode: Literal["slow", "fast"] = option("slow", "a mode")
    table: str = option("one", "a row of a table", choices=("one", "two"))
    long: str = option("a" * 30, "a row of a long table", choices=("a" * 30, "b" * 30))
    inner: Inner = option(Inner(), "a mapping")
    rows: tuple[Inner, ...] = option((), "a list of mappings")
    named: tuple[Inner, ...] = option((), "another list", flag="--other", form="[{weight: X}]")
    hidden: int = option(0, "only in YAML", flag="")
    switch: bool = option(True, "a switch")


def test_flags_follow_annotations_and_metadata(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = Parser("try", "Try it.")
    add_fields(parser, Config)
    text = parser.format_help()
    for line in (
        "  --count N             a number of things [default: 3]",
        "  --rate NUMBER         a rate",
        "  --mode {slow,fast}    a mode [default: slow]",
        "  --table {one,two}     a row of a table [default: one]",
        "  --inner YAML          a mapping [default: weight: 1]",
        "  --other [{weight: X}]",
        "  --switch, --no-switch",
    ):
        assert line in text.splitlines(), line
    assert f"one of {'a' * 30}, {'b' * 30}" in " ".join(text.split())
    assert "--rows" not in text and "--hidden" not in text
    words = ["--count", "4", "--other", "[{weight: 2}]", "--no-switch", "--mode", "fast"]
    assignments = assignments_of(parser.parse_args(words), Config, "x.")
    assert assignments == ["x.count=4", "x.mode=fast", "x.named=[{weight: 2}]", "x.switch=false"]
    config = parse(Config, override({}, [text[2:] for text in assignments]), "")
    assert config == Config(count=4, mode="fast", named=(Inner(2.0),), switch=False)
    with pytest.raises(InputError, match="command line: unrecognized arguments: --coun"):
        parser.parse_args(["--coun", "4"])


# ---- version and module
def test_version(call):
    assert call("--version") == (0, f"merit-fast {merit_fast.__version__}\n", "")
    code, out, err = call("--verbose")
    assert (code, out) == (2, "") and "no such option: --verbose" in err


@pytest.mark.process
def test_python_m_merit_fast_is_the_command(tmp_path):
    def run(*words):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        command = [sys.executable, "-m", "merit_fast", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    version = run("--version")
    assert (version.returncode, version.stdout) == (0, f"merit-fast {merit_fast.__version__}\n")
    failed = run("run", "nope.yml")
    assert (failed.returncode, failed.stderr) == (2, "error: nope.yml: does not exist\n")
