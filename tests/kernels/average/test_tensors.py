"""The average of torch tensors: equal bits on eager and cpu, in place, mixed types, errors."""

import numpy as np
import pytest
import torch

from merit_fast.errors import BackendUnavailableError
from merit_fast.kernels import dispatch
from merit_fast.kernels.average import (
    FLOAT_DTYPES,
    average_arrays,
    foreach_weighted_average,
    weighted_average,
)
from merit_fast.kernels.average import _ops as family

WEIGHTS = [0.1, 0.2, 0.3, 0.4]
NAMES = dict(zip(family.DTYPES, FLOAT_DTYPES, strict=True))
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def adversarial(dtype, seed, n=5003):
    """Random bit patterns: denormals, signed zeros, infinities and NaN among them."""
    raw = np.random.default_rng(seed).integers(0, 256, n * dtype.itemsize).astype(np.uint8)
    return torch.from_numpy(raw).view(dtype)


def array(tensor):
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def same(a, b):
    nan = a.isnan() & b.isnan()
    return a.dtype == b.dtype and bool(
        ((a.view(BITS[a.itemsize]) == b.view(BITS[b.itemsize])) | nan).all()
    )


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("out_dtype", family.DTYPES)
def test_tensors_of_mixed_types_give_the_bits_of_arrays(backend, out_dtype):
    tensors = [adversarial(dtype, seed) for seed, dtype in enumerate(family.DTYPES)]
    out = torch.empty(5003, dtype=out_dtype)
    assert weighted_average(tensors, WEIGHTS, out, backend=backend) is out
    expected = average_arrays(
        [array(t) for t in tensors],
        WEIGHTS,
        dtypes=list(FLOAT_DTYPES),
        out_dtype=NAMES[out_dtype],
        backend="eager",
    )
    result = array(out)
    expected = torch.from_numpy(expected)
    expected = expected.view(torch.bfloat16) if out_dtype == torch.bfloat16 else expected
    assert same(torch.from_numpy(result).view(out_dtype), expected)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_sixteen_bit_results_are_rounded_once(backend):
    """1 + 2^-8 and a hair more: by way of float32 the hair is lost and the tie goes down."""
    value = torch.tensor([1 + 2**-8 + 2**-40, 1 + 2**-8], dtype=torch.float64)
    out = weighted_average([value], [1.0], torch.empty(2, dtype=torch.bfloat16), backend=backend)
    assert out.tolist() == [1 + 2**-7, 1.0]
    value = torch.tensor([1 + 2**-11 + 2**-40, 1 + 2**-11], dtype=torch.float64)
    out = weighted_average([value], [1.0], torch.empty(2, dtype=torch.float16), backend=backend)
    assert out.tolist() == [1 + 2**-10, 1.0]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_large_tensors_are_cut_and_joined(backend, monkeypatch):
    monkeypatch.setattr(family, "_CHUNK", 1000)
    models = [[torch.randn(n) for n in (1, 999, 1000, 4001)] for _ in range(2)]
    results = foreach_weighted_average(models, [0.25, 0.75], backend=backend)
    for a, b, result in zip(*models, results, strict=True):
        assert torch.equal(result, (0.25 * a.double() + 0.75 * b.double()).float())


def test_many_at_once_equal_one_by_one():
    models = [
        [adversarial(d, 7 * k + i, 100 * i + 1) for i, d in enumerate(family.DTYPES)]
        for k in range(3)
    ]
    results = foreach_weighted_average(models, WEIGHTS[:3])
    for i, result in enumerate(results):
        assert same(result, weighted_average([model[i] for model in models], WEIGHTS[:3]))
    assert foreach_weighted_average([[], []], [0.5, 0.5]) == []


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_in_place_and_on_parameters(backend):
    live = torch.nn.Parameter(torch.randn(3, 5))
    average = torch.randn(3, 5)
    expected = (0.9 * average.double() + 0.1 * live.double()).float()
    result = weighted_average([average, live], [0.9, 0.1], average, backend=backend)
    assert result is average and torch.equal(average, expected)
    weighted_average([live, average], [0.5, 0.5], live, backend=backend)
    assert live.requires_grad and live.grad_fn is None


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_strided_tensors_in_and_out(backend):
    a = torch.randn(6, 4).t()
    b = torch.randn(8, 6)[::2]
    out = torch.zeros(6, 8).t()[::2]
    weighted_average([a, b], [0.5, 0.5], out, backend=backend)
    assert torch.equal(out, ((a.double() + b.double()) / 2).float())
    expected = ((a.double() + b.double()) / 2).float()
    weighted_average([a, b], [0.5, 0.5], a, backend=backend)
    assert torch.equal(a, expected)


def test_scalars_and_empty_tensors():
    assert weighted_average([torch.tensor(1.0), torch.tensor(3.0)], [0.5, 0.5]).item() == 2.0
    assert weighted_average([torch.empty(0, 3)] * 2, [0.5, 0.5]).shape == (0, 3)


def test_a_result_may_not_overlap_what_another_tensor_reads():
    whole = torch.zeros(11)
    with pytest.raises(ValueError, match="overlaps"):
        weighted_average([whole[:10], torch.zeros(10)], [0.5, 0.5], whole[1:])
    tied = torch.zeros(4)
    with pytest.raises(ValueError, match="overlaps"):
        foreach_weighted_average([[tied, tied]], [2.0], [tied, tied])
    a = torch.zeros(4)
    b = torch.zeros(4)
    with pytest.raises(ValueError, match="overlaps"):
        foreach_weighted_average([[a, b]], [2.0], [b, a])
    foreach_weighted_average([[tied, tied]], [2.0], [a, b])  # inputs may be one


def test_bad_arguments_are_named():
    x = torch.zeros(4)
    with pytest.raises(
        ValueError, match="weighted_average: needs as many tensors as weights, got 1, 2"
    ):
        weighted_average([x], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"input 1, tensor 0: shape must be \[4\], got \[2, 2\]"):
        weighted_average([x, torch.zeros(2, 2)], [0.5, 0.5])
    with pytest.raises(
        TypeError, match="out, tensor 0: dtype must be one of bfloat16.*got torch.int64"
    ):
        weighted_average([x], [1.0], torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        ValueError, match="foreach_weighted_average: input 1 must have 2 tensors, got 1"
    ):
        foreach_weighted_average([[x, x], [x]], [0.5, 0.5])
    with pytest.raises(ValueError, match="must be on cpu, is on meta"):
        weighted_average([x, torch.zeros(4, device="meta")], [0.5, 0.5])


def test_the_op_passes_opcheck_and_compiles():
    a = torch.randn(2, 5)
    b = torch.randn(2, 5).bfloat16()
    out = torch.zeros(2, 5)
    torch.library.opcheck(
        family._average, ([a.view(-1), b.view(-1)], [0.5, 0.5], [out.view(-1)], None)
    )

    def blend(x, y):
        weighted_average([x, y], [0.9, 0.1], x)
        return weighted_average([x, y], [0.5, 0.5]) + 1

    expected_x = a.clone()
    expected = blend(expected_x, b)
    compiled = torch.compile(blend, fullgraph=True, backend="aot_eager")(a, b)
    assert torch.equal(compiled, expected) and torch.equal(a, expected_x)


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(4)
    real = dispatch.importlib.util.find_spec
    installed = {"triton": object()}
    monkeypatch.setattr(
        dispatch.importlib.util, "find_spec", lambda name: installed.get(name, real(name))
    )
    with pytest.raises(
        BackendUnavailableError, match="'triton' runs on cuda tensors, got cpu.*TRITON_INTERPRET=1"
    ):
        weighted_average([x], [1.0], backend="triton")
    assert dispatch.choose("weighted_average", "cuda", None) == "triton"
    assert "runs on cuda tensors, got mps" in dispatch.unavailable(
        "weighted_average", "triton", "mps"
    )
    monkeypatch.setattr(
        dispatch.importlib.util, "find_spec", lambda name: None if name == "triton" else real(name)
    )
    with pytest.raises(BackendUnavailableError, match="'triton' is not installed"):
        weighted_average([x], [1.0], backend="triton")


def test_without_triton_a_gpu_falls_back_to_eager_and_says_so(monkeypatch, caplog):
    dispatch._log_fallback.cache_clear()
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch.choose("weighted_average", "cuda", None) == "eager"
    assert "'triton' is not installed" in caplog.text


def test_the_backend_is_chosen_by_environment_too(monkeypatch):
    monkeypatch.setenv("MERIT_FAST_BACKEND", "cuda")
    with pytest.raises(BackendUnavailableError, match="'cuda' has no kernel"):
        weighted_average([torch.zeros(1)], [1.0])
