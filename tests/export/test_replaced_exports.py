"""An export replaces an earlier one as a whole, and leaves everything else in its folder."""

import json

import pytest

from merit_fast.export import groups, target
from merit_fast.export.folder import export_folder


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_a_failure_in_the_middle_leaves_the_earlier_export(call, export, plain_run, monkeypatch):
    out, _ = export(plain_run, "axolotl")
    (out / "models").mkdir()
    (out / "models" / "weights").write_text("trained")
    before = contents(out)
    written = []

    def fail(file, *_):
        written.append(file)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return 0

    monkeypatch.setattr(target, "write_rows", fail)
    call("export", str(plain_run), "--format", "trl", "--out", str(out))
    assert len(written) == 2 and contents(out) == before
    new = out.with_name("new")
    written.clear()
    call("export", str(plain_run), "--format", "trl", "--out", str(new))
    assert not new.exists()


def test_a_killed_export_is_replaced_and_models_stay(export, plain_run):
    out, _ = export(plain_run, "trl")
    complete = contents(out)
    (out / "groups.json").unlink()  # as a kill between the moves of files leaves it
    (out / ".unfinished").mkdir()
    (out / ".unfinished" / "train_7.jsonl").write_text("{")
    (out / "train_7.3.jsonl").write_text("{")
    (out / "models").mkdir()
    (out / "models" / "weights").write_text("trained")
    export(plain_run, "trl")
    assert contents(out) == {**complete, "models/weights": b"trained"}
    export(plain_run, "axolotl")
    assert not [name for name in contents(out) if name.startswith("trl_")]


def test_the_report_comes_last(tmp_path):
    with export_folder(tmp_path / "out") as unfinished:
        for name in ("groups.json", "train_0.jsonl"):
            (unfinished / name).write_text("{}")
        assert not (tmp_path / "out" / "groups.json").exists()
    assert sorted(contents(tmp_path / "out")) == ["groups.json", "train_0.jsonl"]


@pytest.mark.parametrize("name", ["notes.txt", "groups.json"])
def test_other_content_is_refused_before_any_row_is_read(
    call, plain_run, tmp_path, name, monkeypatch
):
    out = tmp_path / "other"
    out.mkdir()
    (out / name).write_text(json.dumps({"groups": "mine"}))
    monkeypatch.setattr(groups, "groups_of", lambda *_: pytest.fail("rows are read"))
    code, _, error = call("export", str(plain_run), "--format", "trl", "--out", str(out))
    assert code == 2
    assert error.splitlines()[-1].endswith(
        f"{out}: must be empty or hold an earlier export, found {name}"
    )
    code, _, error = call("export", str(plain_run), "--format", "trl", "--out", str(out / name))
    assert code == 2 and "must be a folder, found a file" in error
