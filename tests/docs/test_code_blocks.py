"""Every code block of README.md and docs/ runs, or has a marker with the reason why it cannot."""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tomllib

import pytest
from support.docs.pages import (
    LANGUAGES,
    NAMED,
    PAGES,
    ROOT,
    blocks_of,
    commands_of,
    inline_code,
    name_of,
)

from merit_fast.cli.main import main
from merit_fast.errors import InputError
from merit_fast.options.yaml import read_yaml_documents
from merit_fast.pipeline.config import read_run_config

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
CODE_PAGES = [page for page in PAGES if any(block.language != "text" for block in blocks_of(page))]
MARKED = [block for block in BLOCKS if block.marker]
TARGETS = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.M)


def test_every_block_names_its_language_and_every_marker_its_reason():
    wrong = [f"{b.where}: language {b.language!r}" for b in BLOCKS if b.language not in LANGUAGES]
    wrong += [f"{b.where}: a marker without a reason" for b in MARKED if not b.reason]
    text = "".join(page.read_text() for page in PAGES)
    assert text.count("<!-- not run") + text.count("<!-- parsed only") == len(MARKED)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.where)
def test_marked_blocks_are_listed(block, monkeypatch):
    """Their merit-fast commands are parsed all the same."""
    for words in commands_of(block.code) if block.language == "sh" else []:
        if words[0] == "merit-fast":
            parse_command(words, monkeypatch, block.where)
    pytest.skip(f"{block.where}: {block.marker}: {block.reason}")


@pytest.mark.parametrize("page", CODE_PAGES, ids=name_of)
def test_blocks_of_a_page_run_in_order(page, working_directory, monkeypatch, capsys):
    names = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.marker:
            continue
        if block.language == "python":
            run_python(block, names)
        elif block.language == "sh":
            for words in commands_of(block.code):
                run_command(words, monkeypatch, capsys, block.where)
        elif block.language == "yaml":
            check_yaml(block, working_directory)
        elif block.language == "json":
            json.loads(block.code)
        elif block.language == "toml":
            tomllib.loads(block.code)


def run_python(block, names):
    """Line numbers of a traceback are those of the page."""
    padding = "\n" * (block.line - 1)
    exec(compile(padding + block.code, str(block.page), "exec"), names)


def run_command(words, monkeypatch, capsys, where):
    program = words[0].removeprefix(".venv/bin/")
    if program == "merit-fast":
        capsys.readouterr()
        code = exit_code(words, monkeypatch)
        assert code == 0, f"{where}: {' '.join(words)}: {code}: {capsys.readouterr().err}"
    elif program == "make":
        unknown = set(words[1:]) - set(TARGETS)
        assert not unknown, f"{where}: the Makefile has no target {unknown}"
    elif program == "python" and words[1] == "-m" and words[2].startswith("bench."):
        pass  # test_benchmarks_show_their_help
    elif program == "python" and words[1].startswith("examples/"):
        assert (ROOT / words[1]).is_file(), f"{where}: {words[1]} is absent"
    else:
        raise AssertionError(
            f"{where}: {' '.join(words)}: give the block a marker, or a check here"
        )


def exit_code(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def parse_command(words, monkeypatch, where):
    """Parses the words with the command's own parser and stops there."""
    parse = argparse.ArgumentParser.parse_intermixed_args

    def parse_only(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse_only)
        assert exit_code(words, patch) == 0, f"{where}: {' '.join(words)}"


def test_a_wrong_option_is_noticed(monkeypatch):
    with pytest.raises(AssertionError, match="here: merit-fast merge OUT --modle A"):
        parse_command(["merit-fast", "merge", "OUT", "--modle", "A"], monkeypatch, "here")


def check_yaml(block, folder):
    """Reads it strictly, as a run or a merge recipe. A first line `# NAME.yml` names its file."""
    name = NAMED.match(block.code)
    file = folder / (name.group(1) if name else "block.yml")
    file.write_text(block.code)
    documents = read_yaml_documents(file)
    values = documents[0]
    if len(documents) > 1:
        from merit_fast.integrations.mergekit.several import read_steps

        read_steps(file, documents, folder / "OUT")
    elif "experts" in values:
        from merit_fast.integrations.mergekit.moe.document import moe_document

        moe_document(values, str(file))
    elif "merge_method" in values or "slices" in values:
        from merit_fast.integrations.mergekit.recipe import read_mergekit

        read_mergekit(file)
    elif "trajectory" in values:
        from merit_fast.cli.merge.trajectory import read_trajectory_file

        read_trajectory_file(file)
    else:
        read_run_config(file)


def test_wrong_keys_are_noticed(tmp_path):
    file = tmp_path / "run.yml"
    file.write_text("model: m\nmixture: [{name: a, path: b}]\nsplit: {grops: 2}\n")
    with pytest.raises(InputError, match=r"split.grops: unknown key; did you mean groups\?"):
        read_run_config(file)


def benchmark_modules():
    """Names behind `python -m` in blocks and in prose."""
    commands = [
        words for block in BLOCKS if block.language == "sh" for words in commands_of(block.code)
    ]
    texts = [" ".join(words) for words in commands]
    texts += [text for page in PAGES for text in inline_code(page)]
    return sorted({name for text in texts for name in re.findall(r"python -m (bench[\w.]+)", text)})


@pytest.mark.process
@pytest.mark.slow
def test_benchmarks_show_their_help():
    """All in one process: each import costs seconds."""
    modules = benchmark_modules()
    assert modules
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    assert not absent
    code = (
        "import contextlib, io, runpy, sys\n"
        f"for name in {modules!r}:\n"
        "    sys.argv = [name, '--help']\n"
        "    shown = io.StringIO()\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(shown):\n"
        "            runpy.run_module(name, run_name='__main__')\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code, name\n"
        "    assert 'usage:' in shown.getvalue(), name\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_make_targets_in_prose_exist():
    named = {
        target
        for page in PAGES
        for text in inline_code(page)
        if text.startswith("make ")
        for target in text.split()[1:]
    }
    assert named and not named - set(TARGETS), named - set(TARGETS)
