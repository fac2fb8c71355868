"""select, duplicates and outliers on a small run, from its YAML to files and errors."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from support.paths import KILL_AT
from support.row_store.facts import FACTS, fact_line
from support.warm import run_python

import merit_fast
from merit_fast.errors import InputError
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run
from merit_fast.selection.picked import num_kept


def files_of(folder):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_select_writes_the_original_rows_with_scores(copied_run, call):
    code, out, err = call(
        *("select", "run.yml", "--target", "codes", "--keep", "7", "--out", "picked.jsonl")
    )
    assert (code, err) == (0, "")
    assert out.startswith("select: 7 of 28 rows in picked.jsonl: cosine ")
    assert "cannot be told apart from the last one" in out
    hits = merit_fast.open_rows(copied_run.out).search("codes", k=100)
    lines = Path("picked.jsonl").read_text().splitlines()
    assert len(lines) == 7
    for line, hit in zip(lines, hits, strict=False):
        row = json.loads(line)
        original = copied_run.lines[hit.dataset][hit.row]
        assert line.startswith(original[:-1] + ", ")  # byte for byte
        assert (row["dataset"], row["row"]) == (hit.dataset, hit.row) and hit.dataset != "codes"
        assert row["score"] == pytest.approx(hit.score) and row["error"] == pytest.approx(hit.error)


def test_a_share_counts_all_rows_but_the_targets_own(copied_run, call):
    words = ("select", "run.yml", "--target", "codes", "--out", "picked.jsonl", "--json")
    report = json.loads(call(*words, "--keep", "10%")[1])
    assert (report["kept"], report["candidates"]) == (3, 28)
    assert report["weight"] == "tokens"  # split.weight
    assert sum(report["datasets"].values()) == 3 and "codes" not in report["datasets"]
    report = json.loads(call(*words, "--keep", "999", "--by", "dot", "--weight", "examples")[1])
    assert (report["kept"], report["by"]) == (28, "dot")
    assert len(Path("picked.jsonl").read_text().splitlines()) == 28


def test_rows_of_another_file_are_a_target_and_are_sketched_once(copied_run, call, monkeypatch):
    lines = [fact_line(question, answer, 0) for question, answer in FACTS[:4]]
    Path("wanted.jsonl").write_text("\n".join(lines))
    words = ("select", "run.yml", "--target", "wanted=wanted.jsonl", "--keep", "8")
    code, _, err = call(*words, "--out", "picked.jsonl")
    assert code == 0, err
    picked = [json.loads(line) for line in Path("picked.jsonl").read_text().splitlines()]
    same = [row for row in picked if row["dataset"] == "facts"]
    assert {row["row"] % 6 for row in same} == {0, 1, 2, 3}  # the same facts, twice in the mixture
    assert len(same) == 8 and all(row["error"] > 0 for row in picked)
    from merit_fast.sketch.mixture import stage

    monkeypatch.setattr(stage, "load_model_for", None)  # nothing is left to sketch
    assert call(*words, "--out", "again.jsonl")[0] == 0
    assert Path("again.jsonl").read_bytes() == Path("picked.jsonl").read_bytes()
    assert "targets/" in call("clean", "run.yml", "--yes")[1]
    assert not [path for path in Path("out/targets").iterdir() if path.is_dir()]
    assert call("sketch", "run.yml")[1] == "sketch: up to date: out/sketch\n"


def test_a_target_from_a_file_is_multiplied_by_the_factors_of_the_run(copied_run, call):
    """The same rows under another name: sketched with the run's factors they have equal scores."""
    kfac = ("split.normalize=kfac", "split.store=true")
    assert call("sketch", "run.yml", *kfac)[0] == 0
    Path("again.jsonl").write_text("\n".join(copied_run.lines["codes"]))
    words = ("--keep", "100%", "--out", "picked.jsonl")
    assert call("select", "run.yml", *kfac, "--target", "codes", *words)[0] == 0
    picked = [json.loads(line) for line in Path("picked.jsonl").read_text().splitlines()]
    inside = {(row["dataset"], row["row"]): row["score"] for row in picked}
    code, _, err = call("select", "run.yml", *kfac, "--target", "again=again.jsonl", *words)
    assert code == 0, err
    picked = [json.loads(line) for line in Path("picked.jsonl").read_text().splitlines()]
    outside = {(row["dataset"], row["row"]): row["score"] for row in picked}
    assert inside.keys() < outside.keys()
    assert {key: outside[key] for key in inside} == pytest.approx(inside, abs=1e-3)


def test_columns_that_rows_have_already_keep_their_values(copied_run, call):
    data = Path("scored.jsonl")
    lines = [
        json.dumps({"score": i, "row": "mine", **json.loads(fact_line(q, a, i))})
        for i, (q, a) in enumerate(FACTS)
    ]
    data.write_text("\n".join(lines))
    text = Path("run.yml").read_text()
    Path("run.yml").write_text(
        text.replace("mixture:\n", f"mixture:\n- {{name: scored, path: {data}}}\n")
    )
    assert call("sketch", "run.yml", "--store")[0] == 0
    code, _, err = call(
        *("select", "run.yml", "--target", "facts", "--keep", "30", "--out", "picked.jsonl")
    )
    assert code == 0, err
    rows = [json.loads(line) for line in Path("picked.jsonl").read_text().splitlines()]
    own = [row for row in rows if row["dataset"] == "scored"]
    assert len(own) == 6
    for row in own:
        assert row["row"] == "mine" and row["score"] == row["merit_row"]
        assert -1 <= row["merit_score"] <= 1
    assert all("merit_row" in row and "merit_score" in row for row in rows)


def test_rows_of_a_table_are_written_as_json(stored_run, tmp_path, monkeypatch, call):
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    lines = [json.loads(fact_line(*fact, i)) for i, fact in enumerate(FACTS)]
    Dataset.from_list(lines).to_parquet("facts.parquet")
    text = stored_run.config.read_text()
    path = stored_run.config.parent / "facts.jsonl"
    Path("run.yml").write_text(text.replace(str(path), "facts.parquet"))
    assert call("sketch", "run.yml", "--store")[0] == 0
    words = ("--target", "codes", "--keep", "100%", "--out", "picked.jsonl")
    code, _, err = call("select", "run.yml", *words)
    assert code == 0, err
    rows = [json.loads(line) for line in Path("picked.jsonl").read_text().splitlines()]
    own = {row["row"]: row for row in rows if row["dataset"] == "facts"}
    assert len(own) == 6
    for number, row in own.items():
        assert {key: row[key] for key in ("number", "messages")} == lines[number]
    assert not Path("picked_images").exists()


@pytest.mark.parametrize("examples", ["all", "6"])
def test_row_numbers_count_held_out_rows_too(stored_run, tmp_path, monkeypatch, call, examples):
    monkeypatch.chdir(tmp_path)
    text = stored_run.config.read_text()
    Path("run.yml").write_text(text.replace("- name: facts", "- eval_share: 0.4\n  name: facts"))
    assert call("sketch", "run.yml", "--store", "--examples", examples)[0] == 0
    stored = set(merit_fast.open_rows("out").dataset("facts").row.tolist())
    assert stored < set(range(12)) and stored != set(range(len(stored)))
    words = ("--target", "codes", "--keep", "100%", "--out", "picked.jsonl")
    code, _, err = call("select", "run.yml", *words, f"split.examples={examples}")
    assert code == 0, err
    rows = [json.loads(line) for line in Path("picked.jsonl").read_text().splitlines()]
    own = [row for row in rows if row["dataset"] == "facts"]
    assert {row["row"] for row in own} == stored
    assert all(row["number"] == row["row"] for row in own)  # as fact_line numbers them


@pytest.mark.parametrize(
    "change,message",
    [
        ({"--target": "nobody"}, "--target: must be one of facts, codes, plurals, opposites, or"),
        ({"--target": "codes=x.jsonl"}, "NAME of NAME=PATH must not be in the mixture"),
        ({"--target": "a b=x.jsonl"}, "--target: name: must be a file name"),
        ({"--target": "new=absent.jsonl"}, "absent.jsonl"),
        ({"--keep": "0"}, "--keep: must be N of at least 1, or P% up to 100%, found '0'"),
        ({"--keep": "101%"}, "--keep: must be N of at least 1"),
        ({"--keep": "nan%"}, "--keep: must be N of at least 1"),
        ({"--keep": "many"}, "--keep: must be N of at least 1"),
        ({"--out": "."}, "--out: must be a file in an existing folder"),
        ({"--out": "no/such/folder.jsonl"}, "--out: must be a file in an existing folder"),
        ({"--by": "angle"}, "--by"),
    ],
)
def test_bad_words_are_refused_before_any_work(copied_run, call, change, message):
    words = {"--target": "codes", "--keep": "5", "--out": "picked.jsonl", **change}
    before = files_of(Path())
    code, out, err = call("select", "run.yml", *(word for pair in words.items() for word in pair))
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1
    assert files_of(Path()).keys() == before.keys()


def test_a_target_that_is_the_whole_mixture_is_refused():
    with pytest.raises(InputError, match="--target: must leave rows of other datasets"):
        num_kept(5, 0)
    assert [num_kept(keep, 30) for keep in (5, 99, 0.1, 0.101, 1.0)] == [5, 30, 3, 4, 30]


def test_a_file_of_rows_is_never_overwritten(copied_run, call):
    config = read_run_config(Path("run.yml"))
    path = config.mixture[0].path
    before = Path(path).read_bytes()
    code, _, err = call("select", "run.yml", "--target", "codes", "--keep", "5", "--out", path)
    assert code == 2 and "must not be a file of rows (facts)" in err
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize("command", ["select", "duplicates", "outliers"])
@pytest.mark.parametrize("state", ["absent", "no store", "other config", "damaged"])
def test_a_store_that_is_not_there_names_the_command_that_makes_it(
    copied_run, call, command, state
):
    words = ["run.yml"]
    if command == "select":
        words += ["--target", "codes", "--keep", "5", "--out", "picked.jsonl"]
    if state == "absent":
        shutil.rmtree(copied_run.out)
    elif state == "no store":
        Run(read_run_config(Path("run.yml"), ["output=plain"])).sketch()
        words.append("output=plain")
    elif state == "other config":
        words.append("split.seed=9")
    else:
        next((copied_run.out / "sketch/rows/codes").glob("*.safetensors")).unlink()
    code, out, err = call(command, *words)
    assert code == 2 and out == "" and not Path("picked.jsonl").exists()
    assert err.endswith("run first: merit-fast sketch run.yml --store\n") and err.count("\n") == 1


def test_duplicates_are_the_rows_that_the_files_hold_twice(copied_run, call):
    code, out, err = call("duplicates", "run.yml", "--above", "0.9999", "--json")
    assert (code, err) == (0, "")
    pairs = json.loads(out)["pairs"]
    found = {(tuple(pair["a"]), tuple(pair["b"])) for pair in pairs}
    for i in range(6):
        assert (("facts", i), ("facts", i + 6)) in found
    for name in ("codes", "plurals", "opposites"):
        lines = copied_run.lines[name]
        expected = {
            ((name, i), (name, j))
            for i in range(len(lines))
            for j in range(i + 1, len(lines))
            if lines[i] == lines[j]
        }
        assert expected and expected <= found
    assert all(pair["cosine"] >= 0.9999 for pair in pairs)
    text = call("duplicates", "run.yml", "--above", "0.9999")[1]
    assert text.startswith(f"{len(pairs)} pairs with a cosine of at least 0.9999")
    code, _, err = call("duplicates", "run.yml", "--above", "2")
    assert code == 2 and "above: must be above 0 and at most 1, found 2.0" in err


def test_outliers_of_each_dataset_are_shown_with_errors(copied_run, call):
    code, out, err = call("outliers", "run.yml", "--keep", "2", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)["outliers"]
    rows = merit_fast.open_rows(copied_run.out)
    assert list(found) == rows.datasets
    for name, hits in found.items():
        expected = rows.outliers(name, 2)
        assert [hit["row"] for hit in hits] == [hit.row for hit in expected]
        assert all(hit["error"] > 0 for hit in hits)
    assert len(call("outliers", "run.yml", "--keep", "2")[1].splitlines()) == 9
    code, _, err = call("outliers", "run.yml", "--keep", "0")
    assert code == 2 and "--keep: must be at least 1, got 0" in err


# ---- the sketch stage of a run
def test_a_config_without_a_store_takes_a_sketch_that_has_one(copied_run, call):
    code, out, _ = call("sketch", "run.yml")  # no store in the YAML, and none asked for
    assert (code, out) == (0, "sketch: up to date: out/sketch\n")
    assert call("split", "run.yml")[0] == 0
    split = (copied_run.out / "split" / "stage.json").read_bytes()
    code, out, _ = call("sketch", "run.yml", "--store", "split.store_dim=4096")
    assert (code, out) == (0, "sketch: up to date: out/sketch\n")
    assert call("split", "run.yml", "--store")[1] == "split: up to date: out/split\n"
    assert (copied_run.out / "split" / "stage.json").read_bytes() == split
    states = json.loads(call("status", "out", "--json")[1])
    assert {one["state"] for one in states["outputs"] if one["name"] in ("sketch", "split")} == {
        "up to date"
    }


def test_an_output_without_a_store_is_sketched_again_where_one_is_asked_for(copied_run, call):
    words = ("run.yml", "output=plain")
    assert call("sketch", *words)[1] == "sketch: done: plain/sketch\n"
    sums = {name: data for name, data in files_of(Path("plain/sketch")).items() if "/" not in name}
    assert call("sketch", *words, "--store")[1] == "sketch: done: plain/sketch\n"
    again = files_of(Path("plain/sketch"))
    for name in ("facts.safetensors", "codes.safetensors"):
        assert again[name] == sums[name]
    for name, data in files_of(copied_run.out / "sketch" / "rows").items():
        assert again[f"rows/{name}"] == data


@pytest.mark.process
@pytest.mark.parametrize(
    "pattern,count", [("00000.safetensors", 2), ("index.json", 2), ("codes.safetensors", 1)]
)
def test_a_killed_sketch_ends_in_the_same_bytes(copied_run, pattern, count):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    words = ["sketch", "run.yml", "output=killed", "split.store=true"]
    killed = run_python([str(KILL_AT), pattern, str(count), *words], None, environment)
    assert killed.returncode == -9, killed.stderr
    assert not Path("killed/sketch").exists() and Path("killed/sketch.tmp").is_dir()
    resumed = run_python(["-m", "merit_fast", *words], None, environment)
    assert resumed.returncode == 0, resumed.stderr
    expected = files_of(copied_run.out / "sketch")
    found = files_of(Path("killed/sketch"))
    assert found.keys() == expected.keys()
    measured = ("stage.json", "config.yml")
    assert all(found[name] == expected[name] for name in expected if name not in measured)
