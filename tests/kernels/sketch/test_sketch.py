"""The CountSketch kernels: one definition on every backend, for any width, kind and part."""

import pytest
import torch
from support.kernels.sketch_cases import BACKENDS, SKETCH

from merit_fast.kernels.sketch import (
    CountSketch,
    embedding_grad_sketch,
    flat_sketch,
    linear_grad_sketch,
    matrix_shape,
    vector_grad_sketch,
)
from merit_fast.kernels.sketch._eager import hash_counters

# Buckets -> rows and columns of a group of tiles
GROUPS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 7: (1, 7), 8: (2, 4), 12: (3, 4)}
GROUPS |= {16: (4, 4), 64: (8, 8)}
SHAPES = [(3, 5, 64), (2, 70, 37), (1, 1, 5), (2, 13, 130), (2, 1, 1), (1, 129, 200)]


def slow_sketch(gradient, name, sketch, first_row=0, first_column=0, columns=None):
    """The definition, entry by entry, with draws in Python integers."""
    batch, rows, width = gradient.shape
    across = -(-(columns or width) // 64)
    p, q = GROUPS[sketch.proj_dim // 4096]
    groups = -(-across // q)
    mask = (1 << 64) - 1
    key = sketch.key(name) & (1 << 64) - 1

    def h(counter):
        z = key + (counter + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    out = torch.zeros(batch, p, q, 64, 64, dtype=torch.float64)
    for r in range(first_row, first_row + rows):
        for c in range(first_column, first_column + width):
            strip, j = r // 64, c // 64
            tile = strip * across + j
            deal = h(8 * (strip // p * groups + j // q) + 3)
            row = (strip + ((deal >> 32) * p >> 32)) % p
            column = (j + ((deal & (1 << 32) - 1) * q >> 32)) % q
            x = h(8 * (strip * groups + j // q) + 4) & 56 | h(8 * tile) & 7
            y = h(8 * (strip // p * across + j) + 5) & 56 | h(8 * tile) >> 8 & 7
            minus = h(8 * tile + 1) >> r % 64 & 1 ^ h(8 * tile + 2) >> c % 64 & 1
            value = gradient[:, r - first_row, c - first_column].double()
            out[:, row, column, r % 64 ^ x, c % 64 ^ y] += (1 - 2 * minus) * value
    return out.flatten(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_flat_sketch_is_the_definition(shape, dtype, backend):
    gradient = torch.randint(-8, 9, shape).to(dtype)  # integers: sums are exact in any order
    result = flat_sketch(gradient, "layer.weight", SKETCH, backend=backend)
    assert torch.equal(result.double(), slow_sketch(gradient, "layer.weight", SKETCH))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("buckets", GROUPS)
def test_any_width_is_the_definition(buckets, backend):
    """A part whose edges lie in tiles and groups, of a parameter with ragged groups."""
    sketch = CountSketch(buckets * 4096, seed=5)
    gradient = torch.randint(-8, 9, (1, 70, 150)).float()
    place = dict(first_row=250, first_column=130, columns=420)
    truth = slow_sketch(gradient, "w", sketch, **place)
    assert torch.equal(flat_sketch(gradient, "w", sketch, **place, backend=backend).double(), truth)
    dy = torch.randint(-4, 5, (1, 9, 70)).float()
    x = torch.randint(-4, 5, (1, 9, 150)).float()
    product = linear_grad_sketch(dy, x, "w", sketch, **place, backend=backend)
    assert torch.equal(product, flat_sketch(dy.mT @ x, "w", sketch, **place, backend="eager"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("buckets", [1, 7, 8, 16])
@pytest.mark.parametrize("kind", ["vector", "expert", "tied", "wide row"])
def test_every_kind_of_parameter_is_the_definition(kind, buckets, backend):
    sketch = CountSketch(buckets * 4096, seed=2)
    dy = torch.randint(-4, 5, (1, 6, 70)).float()
    if kind == "vector":
        result = vector_grad_sketch(dy, "w", sketch, backend=backend)
        gradient = dy.sum(1).view(1, *matrix_shape([70]))
    elif kind == "wide row":
        gradient = torch.randint(-4, 5, (1, 1, 1000)).float()
        result = flat_sketch(gradient[:, 0], "w", sketch, backend=backend)
    elif (
        kind == "expert"
    ):  # the second of three, [50, 70]: its first tile is the first expert's too
        x = torch.randint(-4, 5, (1, 6, 50)).float()
        result = linear_grad_sketch(x, dy, "w", sketch, first_row=50, backend=backend)
        gradient = torch.zeros(1, 150, 70)
        gradient[:, 50:100] = x.mT @ dy
    else:  # a head and an embedding of one name
        ids = torch.tensor([[3, 99, 3, 0, 64, 70]])
        head = torch.randint(-4, 5, (1, 6, 100)).float()
        result = linear_grad_sketch(head, dy, "w", sketch, backend=backend)
        embedding_grad_sketch(dy, ids, "w", sketch, out=result, backend=backend)
        gradient = (head.mT @ dy).index_add(1, ids[0], dy)
    assert torch.equal(result.double(), slow_sketch(gradient, "w", sketch))


def test_hash_is_pinned():
    """A change of any bit needs a new hash version, or old sketches would add to new ones."""
    assert CountSketch(4096, seed=0).key("w") == KEY
    assert hash_counters(torch.tensor([0, 1, 2**40]), 12345).tolist() == HASHES
    sketch = flat_sketch(torch.arange(1.0, 9.0).view(1, 2, 4), "w", CountSketch(8192, 1))
    assert {int(i): float(sketch[0, i]) for i in sketch[0].nonzero()} == ENTRIES


KEY = -3923965601825865643
HASHES = [2454886589211414944, 3778200017661327597, 7128148681715144737]
ENTRIES = {
    5932: 1.0,
    5933: 2.0,
    5934: 3.0,
    5935: 4.0,
    5996: -5.0,
    5997: -6.0,
    5998: -7.0,
    5999: -8.0,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row,column", [(6, 0), (64, 0), (0, 33), (0, 64), (70, 100)])
def test_parts_of_a_parameter_add_up(row, column, backend):
    """For any cut: a tensor-parallel shard, one of several fused matrices, a chunk of rows."""
    gradient = torch.randint(-8, 9, (2, 90, 150)).float()
    out = torch.zeros(2, SKETCH.proj_dim)
    for rows in (slice(0, row), slice(row, 90)):
        for columns in (slice(0, column), slice(column, 150)):
            shard = gradient[:, rows, columns]  # strided: read where it lies
            options = dict(first_row=rows.start, first_column=columns.start, columns=150)
            assert flat_sketch(shard, "w", SKETCH, **options, out=out, backend=backend) is out
    assert torch.equal(out, flat_sketch(gradient, "w", SKETCH, backend=backend))


def test_a_vector_of_one_group_is_kept_without_loss():
    dy = torch.randint(-9, 10, (2, 3, 576)).float()
    sketches = vector_grad_sketch(dy, "norm.weight", CountSketch(65536))
    sums = dy.sum(1)
    assert torch.equal(sketches @ sketches.mT, sums @ sums.mT)


def test_nearby_seeds_and_names_are_unrelated():
    gradient = torch.randn(1, 200, 256)
    keys = [(0, "a"), (1, "a"), (2, "a"), (0, "b")]
    sketches = torch.cat(
        [flat_sketch(gradient, name, CountSketch(4096, seed)) for seed, name in keys]
    )
    cosines = torch.nn.functional.normalize(sketches) @ torch.nn.functional.normalize(sketches).T
    assert (cosines - torch.eye(len(keys))).abs().max() < 5 / 4096**0.5
