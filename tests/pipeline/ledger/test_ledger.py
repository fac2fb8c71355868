"""Whatever happens to a finished run's files, the next run ends right or names the file."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.checks import tree_bytes
from support.runs import MEASURED, Notes

from merit_fast.errors import InputError
from merit_fast.manifests import hashes
from merit_fast.manifests.ledger import rewrite_file
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run

TIMED = (*MEASURED, "evaluate.json")  # holds seconds of the training


def weights_of(output: Path) -> Path:
    return sorted(output.glob("model*.safetensors"))[0]


def truncate(file: Path) -> None:
    os.truncate(file, min(1000, file.stat().st_size // 2))


def flip(file: Path, *, keep_time: bool = False) -> None:
    """Changes one byte; the size stays."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    if keep_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def move_run(out: Path) -> None:
    os.rename(out, out.with_name("elsewhere"))
    shutil.copytree(out.with_name("elsewhere"), out, copy_function=shutil.copyfile)


def edit_ledger(out: Path, **changes: object) -> None:
    ledger = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(ledger | changes))


def finish_without_name(out: Path, name: str) -> None:
    """The state after a crash between stage.json and the rename."""
    os.rename(out / name, out / f"{name}.tmp")
    (out / f"{name}.tmp" / "fingerprint").write_text(
        json.loads((out / f"{name}.tmp" / "stage.json").read_text())["fingerprint"]
    )


DAMAGED = [  # what happens, the file that the note names, the outputs that are made again
    (lambda out: truncate(weights_of(out / "branches/merit-0")), "model-00001", "training again"),
    (lambda out: truncate(weights_of(out / "merged/merit")), "model-00001", "merging again"),
    (lambda out: flip(weights_of(out / "merged/merit")), "other content", "merging again"),
    (
        lambda out: flip(weights_of(out / "merged/merit"), keep_time=True),
        "other content",
        "merging again",
    ),
    (lambda out: truncate(out / "sketch/codes.safetensors"), "1,000 bytes", "sketching again"),
    (lambda out: flip(out / "sketch/codes.safetensors"), "codes.safetensors", "sketching again"),
    (lambda out: (out / "sketch/datasets.json").unlink(), "is absent", "sketching again"),
    (lambda out: truncate(out / "split/split.json"), "split/split.json: ", "splitting again"),
    (lambda out: flip(out / "split/split.json"), "split/split.json: ", "splitting again"),
    (lambda out: truncate(out / "branches/merit-1/branch.json"), "branch.json", "training again"),
    (lambda out: flip(out / "branches/merit-1/config.json"), "config.json", "training again"),
    (lambda out: (out / "branches/merit-1/tokenizer.json").unlink(), "absent", "training again"),
    (lambda out: truncate(out / "branches/merit-1/stage.json"), "stage.json", "training again"),
    (lambda out: (out / "merged/merit/stage.json").unlink(), "stage.json", "merging again"),
    (lambda out: truncate(out / "evaluate/evaluate.json"), "evaluate.json", "evaluating again"),
    (lambda out: (out / "evaluate/merit.json").unlink(), "merit.json", "evaluating again"),
    (lambda out: truncate(out / "report/report.html"), "report.html", "writing it again"),
]
WHOLE = [  # nothing is made again
    ("copied without times", move_run),
    ("touched", lambda out: [os.utime(file) for file in out.rglob("*") if file.is_file()]),
    ("run.json deleted", lambda out: (out / "run.json").unlink()),
    ("run.json cut", lambda out: truncate(out / "run.json")),
    ("run.json of an older version", lambda out: edit_ledger(out, schema_version=2)),
    ("run.json without outputs", lambda out: edit_ledger(out, outputs={})),
    ("a dead lock", lambda out: (out / ".locks").mkdir() or (out / ".locks/guard").touch()),
    (
        "a dead owner",
        lambda out: (out / ".locks").mkdir() or (out / ".locks/owner-x-1-0").write_text("{"),
    ),
    ("killed before a rename", lambda out: finish_without_name(out, "merged/merit")),
    ("killed before the split's rename", lambda out: finish_without_name(out, "split")),
    ("a foreign folder", lambda out: (out / "branches/mine").mkdir()),
    (
        "unfinished work of a branch that is finished",
        lambda out: shutil.copytree(out / "branches/merit-0", out / "branches/merit-0.tmp"),
    ),
    ("a hidden file", lambda out: (out / "merged/merit/.DS_Store").touch()),
]
REFUSED = [  # the error names the file
    ("merged/merit/notes.txt: is not a file of this output", "merged/merit/notes.txt"),
    ("branches/merit-0/model-9.safetensors: is not", "branches/merit-0/model-9.safetensors"),
]


def run_again(config: Path, *, verify: bool = False) -> tuple[Run, list[str]]:
    progress = Notes()
    run = Run(read_run_config(config), progress, verify=verify)
    run.all()
    return run, progress.notes


@pytest.mark.parametrize("case", range(len(DAMAGED)))
def test_a_damaged_output_is_named_and_made_again_to_the_same_bytes(
    case, finished_run, tmp_path, monkeypatch
):
    damage, found, again = DAMAGED[case]
    out = finished_run.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    damage(out)
    _, notes = run_again(finished_run.config)
    (note,) = [note for note in notes if note.endswith(again) and found in note]
    assert "\n" not in note
    assert tree_bytes(out, TIMED) == tree_bytes(finished_run.out, TIMED)
    _, notes = run_again(finished_run.config)
    assert all(note.endswith("up to date") for note in notes)


@pytest.mark.parametrize("case", range(len(WHOLE)), ids=[name for name, _ in WHOLE])
def test_whole_outputs_are_not_made_again(case, finished_run, tmp_path, monkeypatch):
    _, change = WHOLE[case]
    out = finished_run.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    change(out)
    _, notes = run_again(finished_run.config)
    of_stages = [note for note in notes if "(train): " not in note]
    assert all(note.endswith("up to date") or "run.json" in note for note in of_stages)
    json.loads((out / "run.json").read_text())
    for name, digest in tree_bytes(finished_run.out, ("run.json",)).items():
        assert tree_bytes(out)[name] == digest


@pytest.mark.parametrize("message,file", REFUSED)
def test_a_file_of_nobody_is_never_deleted(message, file, finished_run, tmp_path, monkeypatch):
    out = finished_run.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    (out / file).write_text("mine")
    with pytest.raises(InputError, match=f"{message}.*move it away"):
        run_again(finished_run.config)
    assert (out / file).read_text() == "mine"


@pytest.mark.parametrize("name", ["branches/merit-0", "branches/merit-0.tmp"])
def test_a_foreign_folder_in_the_way_is_refused(name, finished_run, tmp_path, monkeypatch):
    out = finished_run.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    (out / "run.json").unlink()
    shutil.rmtree(out / "branches/merit-0")
    (out / name).mkdir()
    (out / name / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=f"{name}: .*move it away"):
        run_again(finished_run.config)
    assert (out / name / "thesis.txt").read_text() == "mine"


def test_a_large_file_is_believed_by_size_and_time_and_hashed_by_verify(
    finished_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(hashes, "SMALL_BYTES", 1)  # so that every file counts as large
    out = finished_run.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    flip(weights_of(out / "merged/merit"), keep_time=True)
    _, notes = run_again(finished_run.config)
    assert all(note.endswith("up to date") for note in notes)
    _, notes = run_again(finished_run.config, verify=True)
    assert any(note.endswith("same size and other content; merging again") for note in notes)


def test_a_stage_refuses_a_damaged_input_by_the_name_of_the_file(
    finished_run, tmp_path, monkeypatch
):
    out = finished_run.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    truncate(weights_of(out / "branches/merit-0"))
    shutil.rmtree(out / "merged/merit")
    run = Run(read_run_config(finished_run.config), command="merit-fast {stage} run.yml")
    with pytest.raises(Exception, match="merit-0/model.*1,000 bytes.*run first: merit-fast train"):
        run.merge()


def test_a_change_says_its_keys_and_the_old_branches_come_back(finished_run, tmp_path, monkeypatch):
    out = finished_run.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    notes = Notes()
    changed = read_run_config(finished_run.config, ["train.epochs=2"])
    Run(changed, notes).train()
    assert "branches/merit-0: train.epochs 1 -> 2; training again" in notes.notes
    assert len(list((out / "old/branches").iterdir())) == 2
    _, again = run_again(finished_run.config)
    assert [note for note in again if "taken up again from old/branches/merit-" in note]
    assert not [note for note in again if note.endswith("training again")]
    assert tree_bytes(out / "branches", TIMED) == tree_bytes(finished_run.out / "branches", TIMED)
    old = sorted((out / "old/branches").iterdir())
    truncate(weights_of(old[0]))
    notes = Notes()
    Run(changed, notes, overwrite=True).train()
    assert any(n.endswith("not taken up again") and old[0].name in n for n in notes.notes)
    assert not old[1].exists()


def test_a_file_that_the_ledger_lets_change_is_no_damage(finished_run, tmp_path, monkeypatch):
    out = finished_run.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    file = out / "branches/merit-0/losses.json"
    rewrite_file(out, "branches/merit-0", file.name, lambda: file.write_text("[]"))
    _, notes = run_again(finished_run.config, verify=True)
    assert all(note.endswith("up to date") for note in notes)
    assert file.read_text() == "[]"


def test_an_edited_base_or_dataset_is_seen(finished_run, tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    finished_run.copy_config(tmp_path)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    before = Run(read_run_config(finished_run.config, [f"model={model}"])).outputs
    first = before.base_fingerprint
    flip(weights_of(model), keep_time=True)
    after = Run(read_run_config(finished_run.config, [f"model={model}"])).outputs
    assert after.base_fingerprint != first


def test_input_hashes_are_cached_by_size_and_time(tmp_path, monkeypatch):
    file = tmp_path / "large"
    file.write_bytes(bytes(hashes.SMALL_BYTES))
    young = hashes.HashCache({})
    digest = young(file)
    assert not young.fresh  # it may change again within the tick of its clock
    os.utime(file, ns=(0, 1_000_000_000))
    cache = hashes.HashCache({})
    assert cache(file) == digest and set(cache.fresh) == {str(file.resolve())}
    flip(file, keep_time=True)
    assert hashes.HashCache(cache.fresh)(file) == digest
    assert hashes.HashCache(cache.fresh, whole=True)(file) != digest
    os.utime(file)
    assert hashes.HashCache(cache.fresh)(file) != digest
