"""The CUDA C++ sketch without a GPU: its source run on the CPU, and compiled for three GPUs."""

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.checks import assert_close, run_at_level
from support.gpu import host_cuda
from support.paths import TESTS

from merit_fast.kernels import dispatch
from merit_fast.kernels.sketch import CountSketch, _cuda, _eager, linear_grad_sketch
from merit_fast.kernels.sketch._target import SketchTarget

pytestmark = pytest.mark.compile
KEY = -1234567890123456789
DTYPES = [torch.bfloat16, torch.float32]
# Rows, columns, tokens of each example, buckets, (first row, first column, parameter's columns)
CASES = {
    "one tile": (64, 64, [32], 1, (0, 0, 64)),
    "ragged, packed, one example empty": (130, 200, [70, 0, 17], 3, (0, 0, 200)),
    "one entry": (1, 1, [1], 2, (0, 0, 1)),
    "shard, loads of 16 bytes": (72, 104, [5, 33], 16, (8, 136, 400)),
    "shard, unaligned": (37, 91, [33, 16], 5, (67, 5, 99)),
    "splits": (576, 200, [20, 0, 3], 2, (0, 0, 200)),
    "groups of 2 x 2": (200, 210, [9], 4, (0, 0, 210)),
    "groups of 2 x 4, cut at every edge": (200, 330, [5], 8, (70, 150, 700)),
}


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    return ctypes.CDLL(str(host_cuda.build_for_cpu(tmp_path_factory.mktemp("cuda"))))


@pytest.fixture
def on_cpu(library, monkeypatch):
    monkeypatch.setattr(_cuda, "launch", host_cuda.launcher(library))


def draw(case: str, dtype: torch.dtype, make=lambda *shape: torch.randint(-4, 5, shape)):
    rows, columns, lengths, buckets, place = CASES[case]
    tokens = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    dy = make(tokens, rows).to(dtype)
    x = make(tokens, columns).to(dtype)
    out = torch.ones(len(lengths), buckets * 4096)
    return dy, x, SketchTarget(offsets, *place, KEY, None, out)


def expected(dy, x, target):
    result = target.out.clone()
    _eager.sketch_linear(dy, x, replace(target, out=result))
    return result


@pytest.mark.parametrize(
    "scaled,backwards", [(False, False), (True, True)], ids=["plain", "scaled, threads backwards"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_integers_give_the_eager_sketch_exactly(
    case, dtype, scaled, backwards, library, monkeypatch
):
    monkeypatch.setattr(_cuda, "launch", host_cuda.launcher(library, backwards))
    dy, x, target = draw(case, dtype)
    if scaled:
        wide = torch.randint(-3, 4, (dy.shape[1], x.shape[1] + 3)).float()
        target = replace(target, scale=wide[:, : x.shape[1]])
    truth = expected(dy, x, target)
    _cuda.sketch_linear(dy, x, target)
    assert torch.equal(target.out, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_and_launches_of_few_examples_change_nothing(dtype, on_cpu, monkeypatch):
    job = draw("ragged, packed, one example empty", dtype)
    truth = expected(*job)
    monkeypatch.setattr(_cuda, "SPLIT_TILES", 1)
    monkeypatch.setattr(_cuda, "PARTIAL_BYTES", 2 * 6 * (3 * 4096) * 4)  # two examples, six splits
    launches = []
    launch = _cuda.launch
    monkeypatch.setattr(
        _cuda, "launch", lambda *arguments: (launches.append(arguments[:2]), launch(*arguments))
    )
    _cuda.sketch_linear(*job)
    assert torch.equal(job[-1].out, truth)
    kernel = "sketch_linear_bf16" if dtype == torch.bfloat16 else "sketch_linear_f32"
    splits = 6
    buckets = 3  # 3 x 4 tiles in groups of 1 x 3
    assert launches == [
        (kernel, 2 * splits * buckets), ("add_splits", 2 * buckets * 32),
        (kernel, splits * buckets), ("add_splits", buckets * 32),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_example_has_the_same_bits_alone_and_in_a_batch(dtype, on_cpu):
    dy, x, target = draw("splits", dtype, torch.randn)
    _cuda.sketch_linear(dy, x, target)
    last = replace(target, offsets=target.offsets[2:] - 20, out=torch.ones_like(target.out[2:]))
    _cuda.sketch_linear(dy[20:], x[20:], last)
    assert torch.equal(target.out[2:], last.out)


@pytest.mark.parametrize("left", [8, 3], ids=["loads of 16 bytes", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_around_the_matrices_is_read(dtype, left, on_cpu):
    """Views into NaN: columns on both sides, and rows of tokens before and after."""
    job = draw("ragged, packed, one example empty", dtype)
    truth = expected(*job)
    framed = []
    for matrix in job[:2]:
        frame = torch.full((len(matrix) + 2, matrix.shape[1] // 8 * 8 + 32), torch.nan, dtype=dtype)
        framed.append(frame[1:-1, left : left + matrix.shape[1]].copy_(matrix))
    assert _cuda._wide(framed[0], 0) is (left == 8)
    _cuda.sketch_linear(*framed, job[2])
    assert torch.equal(job[2].out, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [33, 300])
def test_real_numbers_are_no_worse_than_eager(tokens, dtype, on_cpu):
    dy = torch.randn(tokens, 130).to(dtype)
    x = torch.randn(tokens, 200).to(dtype)
    offsets = torch.tensor([0, tokens])
    target = SketchTarget(offsets, 0, 0, 200, KEY, None, torch.zeros(1, 2 * 4096))
    truth = torch.zeros(2 * 4096, dtype=torch.float64)
    _eager._add_rows(dy.double().T @ x.double(), torch.arange(130), 0, 200, KEY, truth)
    eager = (expected(dy, x, target)[0] - truth).norm()
    _cuda.sketch_linear(dy, x, target)
    assert_close(target.out[0], truth)
    assert (target.out[0] - truth).norm() <= 1.5 * eager + 1e-7 * truth.norm()


def test_the_public_function_runs_it_when_it_is_named(on_cpu, monkeypatch):
    monkeypatch.setattr(dispatch, "choose", lambda op, device, requested: requested)
    dy = torch.randint(-4, 5, (2, 9, 70)).float()
    x = torch.randint(-4, 5, (2, 9, 80)).bfloat16()
    sketch = CountSketch(8192, 3)
    results = [
        linear_grad_sketch(dy, x, "w", sketch, backend=backend) for backend in ("cuda", "eager")
    ]
    assert torch.equal(*results) and results[0].any()
    nothing = linear_grad_sketch(dy[..., :0], x, "w", sketch, backend="cuda")
    assert not nothing.any()


def test_a_parameter_with_too_many_tiles_is_refused():
    out = torch.zeros(1, 4096)
    target = SketchTarget(torch.tensor([0, 1]), 2**38, 0, 64, KEY, None, out)
    with pytest.raises(ValueError, match="counts tiles in 32 bits"):
        _cuda.sketch_linear(torch.ones(1, 1), torch.ones(1, 1), target)


def test_fields_lie_where_the_source_has_them(library):
    library.job_layout.restype = ctypes.c_char_p
    fields = [*_cuda.Job.__dataclass_fields__, "end"]
    assert library.job_layout().decode() == "\n".join(
        f"{field} {8 * n}" for n, field in enumerate(fields)
    )
    values = dict.fromkeys(_cuda.Job.__dataclass_fields__, 0)
    assert len(_cuda.Job(**values).pack()) == 8 * (len(fields) - 1)


def test_no_access_to_shared_memory_meets_a_bank_twice(library):
    """Adds to the bucket: half a warp, 64 bits each, any masks. ldmatrix: 8 tokens of 16 bytes."""
    bank_of = torch.tensor([[library.place_in_bucket(i, j) for j in range(64)] for i in range(64)])
    assert sorted(bank_of.flatten().tolist()) == list(range(4096))
    mask = torch.arange(64)
    lane = torch.arange(16)
    # [masks, places, lanes]
    rows = (torch.arange(0, 64, 4)[:, None] + lane // 4)[None] ^ mask[:, None, None]
    columns = (torch.arange(0, 64, 8)[:, None] + lane % 4 * 2)[None] ^ mask[:, None, None]
    for n in range(8):
        # [row masks, column masks, places, lanes]
        pair = bank_of[rows[:, None], columns[None, :, n, None] & ~1] // 2 % 16
        assert torch.equal(pair.sort(-1).values, lane.expand_as(pair))
    stage = torch.tensor(
        [[library.place_in_stage(t, chunk) // 8 for chunk in range(8)] for t in range(32)]
    )
    assert sorted(stage.flatten().tolist()) == list(range(256))
    assert torch.equal(
        (stage % 8).view(4, 8, 8).sort(1).values, torch.arange(8)[None, :, None].expand(4, 8, 8)
    )


UNDEFINED = """
import ctypes, sys
sys.path[:0] = [{tests!r}, {folder!r}]
from dataclasses import replace
import test_cuda_sketch as cases, torch
from support.gpu import host_cuda
from support.paths import TESTS
from merit_fast.kernels.sketch import _cuda
torch.manual_seed(0)
_cuda.launch = host_cuda.launcher(ctypes.CDLL({library!r}))
for case in cases.CASES:
    for dtype in cases.DTYPES:
        dy, x, target = cases.draw(case, dtype)
        target = replace(target, scale=torch.randn(dy.shape[1], x.shape[1]))
        _cuda.sketch_linear(dy, x, target)
        assert not target.out.isnan().any()
print("clean")
"""


def test_no_undefined_behaviour(tmp_path):
    """In a process of its own, which the sanitizer ends at the first fault."""
    library = host_cuda.build_for_cpu(tmp_path, "-fsanitize=undefined", "-fno-sanitize-recover=all")
    tests = str(TESTS)
    assert (
        run_at_level(
            UNDEFINED.format(tests=tests, folder=f"{tests}/gpu", library=str(library)), None
        )
        == "clean"
    )


ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a"]
BASELINE = json.loads((TESTS / "support" / "gpu" / "cuda_baseline.json").read_text())


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return host_cuda.compile_for(ARCHITECTURES, tmp_path_factory.mktemp("cubin"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_are_those_of_the_baseline_and_none_spills(architecture, compiled):
    """Another release of nvcc may take a few registers more, but as many blocks must fit."""
    spare = 0 if host_cuda.nvcc_release() == BASELINE["nvcc"] else 8
    assert compiled[architecture].keys() == BASELINE[architecture].keys() == set(_cuda.KERNELS)
    for name, kernel in compiled[architecture].items():
        assert (kernel.spill_bytes, kernel.stack_bytes) == (0, 0), name
        assert kernel.registers <= BASELINE[architecture][name]["registers"] + spare, name
        assert kernel.shared_bytes == BASELINE[architecture][name]["shared_bytes"], name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_code_is_matrix_products_wide_copies_and_no_atomics(architecture, compiled):
    bf16, f32, add = (compiled[architecture][name] for name in _cuda.KERNELS)
    for kernel in (bf16, f32, add):
        assert kernel.count(r"(RED|ATOM|LDL|STL)") == 0
    assert bf16.count(r"HMMA\.16816\.F32\.BF16") == 2 * 8  # 32 tokens of 32 x 32 entries
    assert bf16.count(r"LDSM\.\S*\.4") == 2 * 4
    assert f32.count(r"HMMA") == 0 and f32.count("FFMA") >= 4 * 32  # no tf32
    for kernel in (bf16, f32):
        assert kernel.count(r"LDGSTS\.\S*128") >= 4  # a stage: 16 KiB by 128 threads
        assert kernel.count(r"STS\.64") >= 16  # the adds to the bucket, two floats at a time


def test_the_source_lies_next_to_the_module_and_in_a_build(tmp_path):
    assert os.readlink(_cuda.SOURCE) == "../../csrc/cuda/sketch_linear.cu"
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "-e",
        tmp_path,
        "build_py",
        "-d",
        tmp_path / "build",
    ]
    environment = {**os.environ, "MERIT_FAST_NO_NATIVE": "1"}
    result = subprocess.run(
        command, cwd=host_cuda.ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    shipped = tmp_path / "build" / "merit_fast" / "kernels" / "sketch" / "sketch_linear.cu"
    assert not shipped.is_symlink() and shipped.read_bytes() == host_cuda.SOURCE.read_bytes()
