"""Small checkpoints for tests of the reader."""

from pathlib import Path

import pytest

from merit_fast.errors import InputError
from merit_fast.merge import merge_models
from merit_fast.merge.read.checkpoint import read_checkpoint


def assert_refused(directory: Path, message: str) -> None:
    """Asserts that the reader refuses it, and the merge before it writes anything."""
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(directory)
    text = str(error.value)
    assert text.isprintable() and len(text) < 3000 and str(directory) in text
    before = sorted(directory.parent.rglob("*"))
    with pytest.raises(InputError) as error:
        merge_models([directory], [1.0], out=directory.parent / "out")
    assert str(error.value) == text and sorted(directory.parent.rglob("*")) == before
