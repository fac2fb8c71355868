"""Integer counters of normalisation layers, which differ between branches."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from merit_fast.errors import InputError
from merit_fast.merge import merge_models

COUNTER = "norm.num_batches_tracked"


def write(path, **tensors):
    path.mkdir()
    save_file({"w": torch.ones(3), **tensors}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_counter_that_differs_takes_the_largest_value_and_it_is_said(dtype, tmp_path):
    low = -7 if dtype.is_signed else 3
    numbers = [low, 120, 5]
    paths = [
        write(tmp_path / f"m{k}", **{COUNTER: torch.tensor(number, dtype=dtype)})
        for k, number in enumerate(numbers)
    ]
    summary = merge_models(paths, out=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[COUNTER]
    assert merged.dtype == dtype and merged.shape == () and merged.item() == 120
    assert any(f"{COUNTER} ({low}, 120, 5) becomes 120" in note for note in summary["notes"])


def test_equal_counters_are_copied_without_a_note(tmp_path):
    paths = [write(tmp_path / f"m{k}", **{COUNTER: torch.tensor(9)}) for k in range(2)]
    summary = merge_models(paths, out=tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")[COUNTER].item() == 9
    assert summary["notes"] == []


def test_other_integer_tensors_must_be_equal(tmp_path):
    paths = [write(tmp_path / f"m{k}", ids=torch.tensor([1, 2 + k])) for k in range(2)]
    with pytest.raises(InputError, match="ids: a I64 tensor cannot be averaged"):
        merge_models(paths, out=tmp_path / "out")
