"""The CountSketch kernels: one definition on every backend and ISA level, unbiased, linear, of variance 1/D."""

import pytest
import torch
from checks import assert_close, run_at_level

from merit_fast.kernels.sketch import CountSketch, embedding_grad_sketch, flat_sketch, linear_grad_sketch
from merit_fast.kernels.sketch._eager import hash_blocks

SHAPES = [(3, 5, 64), (2, 7, 37), (1, 1, 5), (4, 13, 16), (2, 1, 1)]
BACKENDS = ["cpu", "eager"]


def slow_sketch(gradient, name, sketch):
    """The definition read aloud: one entry at a time, in Python integers."""
    batch, rows, columns = gradient.shape
    out = torch.zeros(batch, sketch.proj_dim, dtype=torch.float64)
    mask = (1 << 64) - 1
    for r in range(rows):
        for column in range(columns):
            block = r * -(-columns // 16) + column // 16
            z = ((sketch.key(name) & mask) + (block + 1) * 0x9E3779B97F4A7C15) & mask
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
            z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
            h = z ^ z >> 31
            lane = column % 16 ^ h >> 16 & 15
            bucket = (h >> 32) * (sketch.proj_dim // 16) >> 32
            sign = 1 - 2 * (h >> lane & 1)
            out[:, 16 * bucket + lane] += sign * gradient[:, r, column].double()
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flat_sketch_is_the_definition(shape, dtype, backend):
    gradient = torch.randint(-8, 9, shape).to(dtype)  # integers: sums are exact in any order
    sketch = CountSketch(proj_dim=528, seed=3)  # 33 buckets: no power of two
    result = flat_sketch(gradient, "layer.weight", sketch, backend=backend)
    assert torch.equal(result.double(), slow_sketch(gradient, "layer.weight", sketch))


def test_hash_is_pinned():
    """A change of any of these bits is a new hash version: old sketches would add to new ones unnoticed."""
    assert CountSketch(16, seed=0).key("w") == -1515129389825903007
    assert hash_blocks(torch.tensor([0, 1, 2**40]), 12345).tolist() == HASHES


HASHES = [2454886589211414944, 3778200017661327597, 7128148681715144737]


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_parameter_add_up(backend):
    gradient, sketch = torch.randint(-8, 9, (2, 10, 40)).float(), CountSketch(256, 1)
    whole = flat_sketch(gradient, "w", sketch, backend=backend)
    out = flat_sketch(gradient[:, 6:], "w", sketch, first_row=6, backend=backend)
    assert flat_sketch(gradient[:, :6], "w", sketch, out=out, backend=backend) is out
    assert torch.equal(out, whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens,rows,columns", [(5, 7, 37), (11, 64, 128), (1, 1, 1), (9, 13, 80), (3, 6, 64)])
def test_linear_grad_sketch_is_the_sketch_of_the_product(tokens, rows, columns, backend):
    dy, x = torch.randint(-4, 5, (3, tokens, rows)).float(), torch.randint(-4, 5, (3, tokens, columns)).float()
    sketch = CountSketch(1024, 5)
    expected = slow_sketch(torch.einsum("bto,bti->boi", dy, x), "w", sketch)
    assert torch.equal(linear_grad_sketch(dy, x, "w", sketch, backend=backend).double(), expected)


def test_eager_products_in_chunks_of_rows_are_the_same(monkeypatch):
    from merit_fast.kernels.sketch import _eager

    dy, x = torch.randint(-4, 5, (2, 5, 37)).float(), torch.randint(-4, 5, (2, 5, 20)).float()
    sketch = CountSketch(256)
    whole = linear_grad_sketch(dy, x, "w", sketch, backend="eager")
    monkeypatch.setattr(_eager, "_CHUNK_ELEMENTS", 500)
    assert torch.equal(linear_grad_sketch(dy, x, "w", sketch, backend="eager"), whole)


def test_linear_grad_sketch_of_real_numbers_in_both_dtypes():
    for dtype in (torch.float32, torch.bfloat16):
        dy, x = torch.randn(2, 33, 50).to(dtype), torch.randn(2, 33, 70).to(dtype)
        sketch = CountSketch(4096)
        truth = slow_sketch(torch.einsum("bto,bti->boi", dy.double(), x.double()), "w", sketch)
        assert_close(linear_grad_sketch(dy, x, "w", sketch), truth)  # bf16 inputs too: products are taken in fp32


@pytest.mark.parametrize("backend", BACKENDS)
def test_embedding_grad_sketch_adds_rows_by_token(backend):
    token_ids = torch.tensor([[3, 1, 3, 0], [2, 2, 2, 2]])
    dy, sketch = torch.randint(-4, 5, (2, 4, 20)).float(), CountSketch(512, 2)
    weight = torch.zeros(2, 5, 20)
    for b in range(2):
        weight[b].index_add_(0, token_ids[b], dy[b])
    expected = flat_sketch(weight, "embed", sketch, backend=backend)
    assert torch.equal(embedding_grad_sketch(dy, token_ids, "embed", sketch, backend=backend), expected)


def test_inner_products_are_unbiased_with_variance_of_one_over_d():
    """300 seeds; three kinds of gradient, rank one and single column among them."""
    proj_dim, seeds = 256, 300
    generator = torch.Generator().manual_seed(1)
    dense = [torch.randn(64, 48, generator=generator) for _ in range(2)]
    columns = [torch.zeros(64, 48) for _ in range(2)]
    for gradient in columns:
        gradient[:, 5] = torch.randn(64, generator=generator)
    vectors = [torch.randn(n, generator=generator) for n in (64, 48, 64, 48)]
    rank_one = [torch.outer(*vectors[:2]), torch.outer(*vectors[2:])]
    for first, second in (dense, columns, rank_one):
        pair = torch.stack([first, second])
        sketches = torch.stack([flat_sketch(pair, "w", CountSketch(proj_dim, seed)) for seed in range(seeds)])
        products = (sketches[:, 0] * sketches[:, 1]).sum(1).double()
        truth, scale = (first * second).sum(), first.norm() * second.norm()
        error = (products - truth) / scale
        assert abs(error.mean()) < 4 * error.std() / seeds**0.5
        bound = (1 + (truth / scale) ** 2) ** 0.5 / proj_dim**0.5  # of the plain CountSketch
        assert error.std() < 1.2 * bound  # the error of a standard deviation from 300 seeds is 4 %; tails are heavier


def test_nearby_seeds_and_names_are_unrelated():
    gradient = torch.randn(1, 40, 64)
    keys = [(0, "a"), (1, "a"), (2, "a"), (0, "b")]
    sketches = torch.cat([flat_sketch(gradient, name, CountSketch(1024, seed)) for seed, name in keys])
    cosines = torch.nn.functional.normalize(sketches) @ torch.nn.functional.normalize(sketches).T
    assert (cosines - torch.eye(len(keys))).abs().max() < 5 / 1024**0.5


def test_threads_batching_and_order_change_no_bit():
    gradient, sketch = torch.randn(5, 9, 100), CountSketch(2048)
    whole = flat_sketch(gradient, "w", sketch)
    assert torch.equal(whole, torch.cat([flat_sketch(g[None], "w", sketch) for g in gradient]))
    assert torch.equal(whole.flip(0), flat_sketch(gradient.flip(0).contiguous(), "w", sketch))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(whole, flat_sketch(gradient, "w", sketch))
    finally:
        torch.set_num_threads(threads)


ISA_SCRIPT = """
import hashlib, torch
from merit_fast.kernels.sketch import *
torch.manual_seed(0)
g = torch.randn(2, 9, 100); dy = torch.randn(2, 21, 19); x = torch.randn(2, 21, 83)
s = CountSketch(1024, 7)
out = [flat_sketch(g, "w", s), flat_sketch(g.bfloat16(), "w", s), linear_grad_sketch(dy, x, "w", s)]
print(hashlib.sha256(b"".join(o.numpy().tobytes() for o in out)).hexdigest())
"""


def test_every_isa_level_gives_the_same_bits(native_levels):
    digests = {level: run_at_level(ISA_SCRIPT, level) for level in native_levels}
    assert len(set(digests.values())) == 1, digests


def test_custom_ops_pass_opcheck():
    from merit_fast.kernels import sketch as family

    gradient, out = torch.randn(2, 3, 20), torch.zeros(2, 64)
    torch.library.opcheck(family._sketch_rows, (gradient, None, 0, 7, out, True))
    torch.library.opcheck(family._sketch_linear, (torch.randn(2, 5, 4), torch.randn(2, 4, 16), 7, out, True))


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda s: flat_sketch(torch.zeros(2, 3, 4, 5), "w", s), r"must be \[B, R, C\]"),
        (lambda s: flat_sketch(torch.zeros(2, 4).T[None], "w", s), "last dimension"),
        (lambda s: flat_sketch(torch.zeros(2, 3, 4), "w", s, row_ids=torch.zeros(2, 2).long()), "row_ids"),
        (lambda s: flat_sketch(torch.zeros(2, 3, 4), "w", s, out=torch.zeros(2, 8)), "out must be"),
        (lambda s: linear_grad_sketch(torch.zeros(2, 3, 4), torch.zeros(2, 2, 4), "w", s), "dy and x must be"),
        (lambda s: CountSketch(100), "multiple of 16"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(CountSketch(64))


def test_bad_dtype_is_a_type_error():
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        flat_sketch(torch.zeros(1, 2, 3, dtype=torch.float64), "w", CountSketch(64))
