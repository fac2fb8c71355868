"""The average's Triton kernel in Triton's interpreter; ``test_interpreted.py`` runs these."""

import pytest
import torch
import triton
import triton.language as tl

from merit_fast.kernels.average import foreach_weighted_average, weighted_average
from merit_fast.kernels.average._dtypes import DTYPES
from merit_fast.kernels.average._triton import BLOCK, describe

WEIGHTS = [0.1, 0.25, -0.3, 0.95]
RAGGED = [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 129, 0, 33]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
EDGES = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0]


def edges(dtype, seed, n=BLOCK + 40):
    """Random bits of all magnitudes, denormals too, then zeros, infinities, NaN and extremes."""
    numbers = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8, generator=numbers).view(
        dtype
    )
    info = torch.finfo(dtype)
    tail = torch.tensor(
        [*EDGES, info.max, -info.max, info.tiny, info.smallest_normal / 2], dtype=dtype
    )
    return torch.cat([raw, tail])


def same(a, b):
    """Bit for bit, any NaN as good as another."""
    nan = a.isnan() & b.isnan()
    return a.dtype == b.dtype and bool(
        ((a.view(BITS[a.itemsize]) == b.view(BITS[b.itemsize])) | nan).all()
    )


def in_order(tensors, weights, dtype, out):
    """Products and sums in ``dtype``, in order; results of 16 bits are rounded through float32."""
    total = torch.tensor(weights[0], dtype=torch.float64).to(dtype) * tensors[0].to(dtype)
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + torch.tensor(weight, dtype=torch.float64).to(dtype) * tensor.to(dtype)
    return total.float().to(out) if out.itemsize < 4 else total.to(out)


def test_the_repaired_interpreter_computes_in_bf16_as_torch_does():
    @triton.jit
    def kernel(a, b, total, product, narrow, N: tl.constexpr):
        i = tl.arange(0, N)
        at = i[:, None] * N + i[None, :]
        x = tl.load(a + at)
        y = tl.load(b + at)
        tl.store(total + at, x + y)
        tl.store(product + at, tl.dot(x, y))
        tl.store(narrow + at, (x.to(tl.float32) * 1.01).to(tl.bfloat16))

    a, b = torch.randn(2, 32, 32).bfloat16()
    total = torch.empty_like(a)
    narrow = torch.empty_like(a)
    product = torch.empty(32, 32)
    kernel[(1,)](a, b, total, product, narrow, 32)
    assert same(total, a + b)
    assert same(narrow, (a.float() * 1.01).bfloat16())
    assert torch.allclose(product, a.float() @ b.float(), atol=1e-4)


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_values_of_one_type_are_summed_in_order_without_loss(dtype, out):
    tensors = [edges(dtype, seed) for seed in range(4)]
    target = torch.full(tensors[0].shape, 7.0, dtype=out)
    weighted_average(tensors, WEIGHTS, target, backend="triton")
    wide = torch.float64 if torch.float64 in (dtype, out) else torch.float32
    assert same(target, in_order(tensors, WEIGHTS, wide, out))


@pytest.mark.parametrize("out", DTYPES)
def test_four_types_at_once(out):
    tensors = [edges(dtype, seed) for seed, dtype in enumerate(DTYPES)]
    target = torch.full(tensors[0].shape, 7.0, dtype=out)
    weighted_average(tensors, WEIGHTS, target, backend="triton")
    assert same(target, in_order(tensors, WEIGHTS, torch.float64, out))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_tensor_of_weight_one_comes_back(dtype):
    tensor = edges(dtype, 3)
    assert same(weighted_average([tensor], [1.0], backend="triton"), tensor)


def test_many_ragged_tensors_of_several_types_are_one_launch(monkeypatch):
    from merit_fast.kernels.average import _triton

    launches = []
    kernel = _triton.average_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(_triton, "average_kernel", Counted())
    kinds = [DTYPES[i % 3] for i in range(len(RAGGED) * 3)]
    sizes = RAGGED * 3
    models = [
        [torch.randn(n).to(kind) for n, kind in zip(sizes, kinds, strict=True)] for _ in range(3)
    ]
    results = foreach_weighted_average(models, WEIGHTS[:3], backend="triton")
    assert launches == [(sum(-(-n // BLOCK) for n in sizes),)]
    for i, (result, kind) in enumerate(zip(results, kinds, strict=True)):
        assert same(
            result, in_order([model[i] for model in models], WEIGHTS[:3], torch.float32, kind)
        )


def test_more_tensors_than_a_search_step_and_each_finds_its_own():
    models = [[torch.full((3,), float(10 * i + k)) for i in range(65)] for k in range(2)]
    results = foreach_weighted_average(models, [0.5, 0.5], backend="triton")
    assert [result.tolist() for result in results] == [[10 * i + 0.5] * 3 for i in range(65)]


def test_in_place_on_any_input_and_shape():
    for k in range(3):
        tensors = [torch.randn(9, BLOCK // 4).bfloat16() for _ in range(3)]
        expected = in_order(tensors, WEIGHTS[:3], torch.float32, torch.bfloat16)
        result = weighted_average(tensors, WEIGHTS[:3], tensors[k], backend="triton")
        assert result is tensors[k] and same(result, expected)


def test_addresses_that_are_no_multiple_of_16_are_told_to_the_compiler():
    whole = [torch.randn(2 * BLOCK + 1).bfloat16() for _ in range(2)]
    shifted = [tensor[1:] for tensor in whole]
    out = torch.empty(2 * BLOCK, dtype=torch.bfloat16)
    assert describe([(whole, whole[0]), (shifted, out)], [0.5, 0.5])[1] == (0, 1)
    result = weighted_average(shifted, [0.5, 0.5], out, backend="triton")
    assert same(result, in_order(shifted, [0.5, 0.5], torch.float32, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_never_worse_than_pytorch_in_the_tensors_own_type(dtype):
    tensors = [torch.randn(8 * BLOCK).to(dtype) * 10**k for k in range(4)]
    truth = sum(w * t.double() for w, t in zip(WEIGHTS, tensors, strict=True))
    plain = sum(w * t for w, t in zip(WEIGHTS, tensors, strict=True))
    ours = weighted_average(tensors, WEIGHTS, backend="triton")
    assert plain.dtype == ours.dtype == dtype
    for norm in (2, float("inf")):
        error = torch.linalg.vector_norm(ours.double() - truth, norm)
        assert error <= torch.linalg.vector_norm(plain.double() - truth, norm)


def test_the_automatic_choice_on_cpu_tensors_stays_native():
    from merit_fast.kernels import dispatch

    assert dispatch.choose("weighted_average", "cpu", None) == "cpu"
    assert "TRITON_INTERPRET" in dispatch.unavailable("weighted_average", "triton", "cuda")
