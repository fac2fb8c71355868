"""bench.compare: runs in turns, ratios pair by pair, refusals, and no worktree left behind."""

import os
import subprocess
import sys

import pytest
from support.paths import ROOT

from bench.compare import Comparison, compare, measure


def run(folder, *arguments):
    """Runs bench.compare with its worktree under ``folder``, which must be gone at the end."""
    command = [sys.executable, "-m", "bench.compare", *arguments]
    environment = {**os.environ, "TMPDIR": str(folder)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    listing = subprocess.run(
        ["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert str(folder) not in listing.stdout and not list(folder.iterdir())
    return result


needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="the sources are no git checkout, so there is no base"
)


@needs_git
def test_a_trivial_command_is_compared_with_a_commit(tmp_path):
    script = "import json, os; print(json.dumps({'tree': {'size': len(os.getcwd())}}))"
    options = ("--base", "HEAD", "--rounds", "2", "--figure", "tree.size")
    result = run(tmp_path, *options, "--", "python", "-c", script)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[2] == f"present  median {len(str(ROOT))} tree.size, interquartile range 0"
    assert lines[1].startswith("base     median ") and lines[-1].endswith(", 2 pairs")
    assert [line.partition(":")[0] for line in lines[3:-1]] == ["pair 1", "pair 2"]


@needs_git
def test_an_unknown_commit_and_a_failing_command_end_in_one_line(tmp_path):
    unknown = run(tmp_path, "--base", "no-such-commit", "--", "python", "-c", "pass")
    assert unknown.returncode == 1 and "no-such-commit" in unknown.stderr
    failing = run(tmp_path, "--base", "HEAD", "--", "python", "-c", "raise SystemExit('no disk')")
    assert failing.returncode == 1
    assert failing.stderr.startswith("compare: ") and failing.stderr.endswith(": no disk\n")


def test_runs_alternate_and_begin_with_the_base(tmp_path):
    trees = [tmp_path / name for name in ("base", "present")]
    for tree in trees:
        tree.mkdir()
    script = "import os; open('../order', 'a').write(os.path.basename(os.getcwd())[0])"
    result = compare([sys.executable, "-c", script], *trees, rounds=3, figure=None)
    assert (tmp_path / "order").read_text() == "bpbpbp"
    assert len(result.base) == len(result.present) == 3 and min(result.base) > 0


def test_ratios_are_of_pairs():
    result = Comparison([2.0, 3.0, 8.0], [1.0, 3.0, 2.0])
    assert result.ratios == [2.0, 1.0, 4.0]
    assert list(result.lines("s"))[-1] == "ratio    median 2.000, 1.000 to 4.000, 3 pairs"


@pytest.mark.parametrize("printed", ["no JSON", "{}", '{"a": "b"}', '{"a": []}'])
def test_a_missing_figure_is_named(tmp_path, printed):
    command = [sys.executable, "-c", f"print({printed!r})"]
    with pytest.raises(SystemExit, match="--figure a: the last line"):
        measure(command, tmp_path, "a")
