"""The sketch's launches in Triton's interpreter: hash, walks, splits, public functions.

``test_interpreted.py`` runs these.
"""

import pytest
import torch
import triton
import triton.language as tl
from support.gpu.sketch_runs import assert_equal_to_eager, integers, launches

from merit_fast.integrations import Projector
from merit_fast.kernels.sketch import (
    CountSketch,
    _eager,
    _triton,
    _triton_tiles,
    embedding_grad_sketch,
    flat_sketch,
    linear_grad_sketch,
    vector_grad_sketch,
)


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_the_hash_is_of_64_bits(key):
    @triton.jit
    def kernel(counters, out, key, N: tl.constexpr):
        at = tl.arange(0, N)
        bits = _triton_tiles.hash_bits(key.to(tl.uint64), tl.load(counters + at).to(tl.uint64))
        tl.store(out + at, bits.to(tl.int64, bitcast=True))

    counters = torch.tensor([0, 1, 2**31, 2**32 + 5, 2**40, 2**62, -1, -2])
    out = torch.empty_like(counters)
    kernel[(1,)](counters, out, key, len(counters))
    assert torch.equal(out, _eager.hash_counters(counters, key))
    gradient = integers(3, 70)
    offsets = torch.tensor([0, 3])
    assert_equal_to_eager("sketch_rows", (gradient, None), offsets, (0, 0, 70), 2, key=key)


@pytest.mark.parametrize("group_rows,group_columns,steps", [(1, 2, 3 * 2), (8, 8, 1)])
def test_a_narrow_shard_is_not_searched_for_among_all_tiles(group_rows, group_columns, steps):
    """Only the groups that its 3 x 2 tiles touch are visited; the first column is skipped."""

    @triton.jit
    def kernel(out, rows, columns, first_row, first_column, group_rows, group_columns):
        _, _, _, steps = _triton_tiles.walk(
            rows, columns, first_row, first_column, group_rows, group_columns
        )
        tl.store(out, steps)

    out = torch.zeros(1, dtype=torch.int64)
    kernel[(1,)](out, 150, 100, 0, 64, group_rows, group_columns)
    assert out.item() == steps


def test_splits_share_a_bucket_and_their_sums_are_added(monkeypatch):
    """Tests fill new memory with NaN: elements of the sums that no program wrote would show."""
    seen = launches(monkeypatch)
    offsets = torch.tensor([0, 3, 7])
    matrices = (integers(7, 256), integers(7, 256))
    assert_equal_to_eager("sketch_linear", matrices, offsets, (0, 0, 256), 1)
    assert_equal_to_eager("sketch_rows", (integers(512, 256), None), offsets * 73, (0, 0, 256), 1)
    rows = (integers(1024, 40), torch.randint(0, 300, (1024,)))
    assert_equal_to_eager("sketch_rows", rows, torch.tensor([0, 1024]), (0, 0, 40), 1)
    add, add_two = (("add_kernel", batch * 4096 // _triton.ADD_BLOCK) for batch in (1, 2))
    assert seen == [
        ("linear_kernel", 2 * 8),
        add_two,
        ("rows_kernel", 2 * 2),
        add_two,
        ("ids_kernel", 2),
        add,
    ]


def test_as_many_programs_as_fill_a_gpu_and_no_more(monkeypatch):
    seen = launches(monkeypatch)
    monkeypatch.setattr(_triton, "PROGRAMS", 12)
    offsets = torch.tensor([0, 3, 7])
    matrices = (integers(7, 256), integers(7, 192))
    assert_equal_to_eager("sketch_linear", matrices, offsets, (0, 0, 192), 1)
    assert seen == [("linear_kernel", 12), ("add_kernel", 2 * 4096 // _triton.ADD_BLOCK)]


def test_the_public_functions_by_name(monkeypatch):
    sketch = CountSketch(2 * 4096, 1)
    calls = launches(monkeypatch)
    dy = integers(2, 7, 40)
    x = integers(2, 7, 70)
    ids = torch.randint(0, 90, (2, 7))
    lengths = torch.tensor([0, 9, 14])
    for call in (
        lambda backend: flat_sketch(dy, "w", sketch, backend=backend),
        lambda backend: vector_grad_sketch(dy, "w", sketch, x=dy, backend=backend),
        lambda backend: embedding_grad_sketch(dy, ids, "w", sketch, backend=backend),
        lambda backend: linear_grad_sketch(dy, x, "w", sketch, backend=backend),
        lambda backend: linear_grad_sketch(
            dy.flatten(0, 1),
            x.flatten(0, 1),
            "w",
            sketch,
            cu_seqlens=lengths,
            scale=integers(40, 70),
            backend=backend,
        ),
    ):
        torch.manual_seed(3)
        expected = call("eager")
        torch.manual_seed(3)
        assert torch.equal(call("triton"), expected) and expected.any()
    names = [name for name, _ in calls]
    assert names == ["rows_kernel", "rows_kernel", "ids_kernel", "linear_kernel", "linear_kernel"]


@pytest.mark.parametrize("proj_dim", [900, 8192])
def test_the_projector_gives_the_numbers_of_eager(proj_dim):
    """Gradients by name, whose parts begin and end inside rows of the hashed matrix."""
    grads = {"bias": integers(2, 37), "weight": integers(2, 30, 300), "scale": integers(2)}
    projected = [
        Projector(9038, proj_dim, 1, backend=backend).project(grads, model_id=3)
        for backend in ("triton", "eager")
    ]
    assert torch.equal(*projected)
