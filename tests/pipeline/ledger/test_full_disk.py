"""A full disk: one line that names the file, whoever has written it, and no file that stays."""

import errno
import os
import resource

import pytest

from merit_fast.errors import InputError, MeritFastError, no_space, write_error
from merit_fast.manifests.atomic import write_text
from merit_fast.pipeline.units.journal import JOURNAL, read_histories, write_event


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 4 KiB; the system says EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_names_its_file_and_leaves_the_old_one(tmp_path, small_files):
    file = tmp_path / "run.json"
    write_text(file, "old")
    with pytest.raises(OSError, match="run.json'$") as caught:
        write_text(file, "x" * 5000)
    assert caught.value.filename == str(file) and no_space(caught.value)
    assert os.listdir(tmp_path) == ["run.json"] and file.read_text() == "old"


def test_errors_of_rust_count_too(tmp_path, small_files):
    import torch
    from safetensors.torch import save_file

    with pytest.raises(Exception, match="os error 27") as caught:
        save_file({"x": torch.zeros(5000)}, tmp_path / "x.safetensors")
    assert no_space(caught.value).endswith("; the same command resumes the work")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_no_bad_input(number):
    error = write_error("out/a", OSError(number, os.strerror(number)))
    assert type(error) is MeritFastError
    assert str(error).startswith("out/a: ") and str(error).endswith("resumes the work")
    denied = write_error("out/a", PermissionError(errno.EACCES, "Permission denied"))
    assert type(denied) is InputError
    assert str(denied) == "out/a: cannot be written: Permission denied"
    assert no_space(ValueError("no space is left")) is None


def test_half_a_line_of_the_journal_costs_no_other_one(tmp_path, small_files):
    """A full disk, or the death of the driver, ends it in the middle."""
    folder = tmp_path / "units"
    folder.mkdir()
    write_event(folder, {"event": "end", "unit": "split", "code": 1, "host": "a"})
    with pytest.raises(OSError, match="units.jsonl'$"):
        write_event(folder, {"event": "end", "unit": "x" * 5000, "code": 0})
    with (folder / JOURNAL).open("r+b") as file:
        file.truncate(200)
    write_event(folder, {"event": "end", "unit": "split", "code": 0, "host": "b"})
    histories = read_histories(tmp_path)
    assert list(histories) == ["split"] and histories["split"].host == "b"
