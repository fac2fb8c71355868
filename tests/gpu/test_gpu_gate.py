"""Every Triton kernel, compiled for GPUs that are not here, holds its baseline; faults are seen."""

import importlib
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from support.paths import ROOT, TESTS

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

import triton
import triton.language as tl
from support.gpu import gate as gpu_gate
from support.gpu import launches as gpu_launches
from support.gpu.code import GpuLaunch, compile_launch
from support.gpu.read_code import figures

pytestmark = pytest.mark.compile

TARGETS = {"sm_90": 90, "gfx942": "gfx942"}


def test_every_kernel_holds_its_baseline():
    """A launch of the baseline's fingerprint is not compiled, except one of every kernel."""
    baseline, remark = gpu_gate.load_baseline()
    launches = gpu_launches.launches()
    rows, changed = gpu_gate.measure_changed(launches, gpu_gate.TARGETS, baseline)
    lines = gpu_gate.failures(rows, baseline.launches if baseline else None)
    assert not lines, "\n".join(
        [*lines, remark or "after a change that is meant: make gpu-baseline"]
    )
    if baseline and changed:
        warnings.warn(
            f"{len(changed)} launches have changed since the baseline and still hold it; "
            "make gpu-baseline spares their compilation",
            stacklevel=1,
        )


def test_no_kernel_is_left_out():
    files = sorted((ROOT / "kernels").glob("*/_triton*.py"))
    modules = [
        importlib.import_module(f"merit_fast.kernels.{file.parent.name}.{file.stem}")
        for file in files
    ]
    jitted = {
        f: name
        for module in modules
        for name, f in vars(module).items()
        if isinstance(f, triton.JITFunction)
    }
    called = {name for f in jitted for name in f.fn.__code__.co_names}
    launched = {launch.kernel for launch in gpu_launches.launches()}
    missing = [name for f, name in jitted.items() if name not in called and f not in launched]
    assert jitted and not missing, f"no launch of {missing} in tests/support/gpu/launches.py"


@triton.jit
def centre(x, out, N: tl.constexpr):
    """Every element stays in a register until the sum of all is known."""
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(out + at, value - tl.sum(value))


@triton.jit
def scatter(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.atomic_add(out + at % 7, tl.load(x + at))


@triton.jit
def histogram(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + tl.arange(0, 64), tl.histogram(tl.load(x + at).to(tl.int32), 64))


@triton.jit
def copy(x, out, n, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def product(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(a + at)
    y = tl.load(b + at)
    if y.dtype == tl.float32:
        x = x.to(tl.float32)
    tl.store(out + at, tl.dot(x, y, input_precision="ieee"))


def measured(kernel, *arguments, targets=TARGETS, warps=4):
    options = {"num_warps": warps}
    return {
        "control": {
            target: figures(compile_launch(kernel, arguments, options, architecture))
            for target, architecture in targets.items()
        }
    }


def floats(dtype=torch.float32):
    return torch.zeros(4096, dtype=dtype)


@pytest.mark.parametrize("target,elements", [("sm_80", 1 << 14), ("gfx942", 1 << 15)])
def test_a_kernel_that_spills_is_caught(target, elements):
    few = measured(
        centre, floats(), floats(), 1024, targets={target: gpu_gate.TARGETS[target]}, warps=1
    )
    assert gpu_gate.failures(few, few) == []
    many = measured(
        centre, floats(), floats(), elements, targets={target: gpu_gate.TARGETS[target]}, warps=1
    )
    lines = gpu_gate.failures(many, many)  # no baseline may allow it
    assert [line.rsplit(" ", 1)[0] for line in lines] == [
        f"control, {target}: spill_bytes must be 0, is"
    ]
    assert int(lines[0].rsplit(" ", 1)[1]) > 0


@pytest.mark.parametrize("kernel", [scatter, histogram], ids=["global", "shared"])
def test_a_kernel_with_atomics_is_caught(kernel):
    rows = measured(
        kernel, floats(), floats(torch.float32 if kernel is scatter else torch.int32), 1024
    )
    lines = gpu_gate.failures(rows, rows)
    assert [line.split(" must")[0] for line in lines] == [
        "control, sm_90: atomics",
        "control, gfx942: atomics",
    ]


def test_a_kernel_that_lost_its_128_bit_accesses_is_caught():
    good = measured(copy, floats(), floats(), 4096, 1024)
    assert gpu_gate.failures(good, good) == []
    by_count = measured(copy, floats(), floats(), 4095, 1024)  # a mask that may end within 128 bits
    by_address = measured(copy, floats()[1:], floats(), 4080, 1024)
    for target, loads in (("sm_90", 2), ("gfx942", 1)):
        assert good["control"][target]["wide_loads"] == loads
        line = f"control, {target}: wide_{{}} was {loads} in the baseline, is 0"
        assert line.format("loads") in gpu_gate.failures(by_count, good)
        assert line.format("stores") in gpu_gate.failures(by_count, good)
        assert line.format("loads") in gpu_gate.failures(by_address, good)
        assert line.format("stores") not in gpu_gate.failures(by_address, good)


def test_a_kernel_that_lost_its_tensor_cores_is_caught():
    kinds = {"sm_80": "HMMA", "sm_90": "WGMMA", "sm_100": "TCGEN5", "sm_120": "HMMA"}
    targets = {target: gpu_gate.TARGETS[target] for target in kinds}
    matrix = floats(torch.bfloat16)
    good = measured(product, matrix, matrix, floats(), 64, targets=targets, warps=8)
    bad = measured(product, floats(), floats(), floats(), 16, targets=targets, warps=8)
    assert gpu_gate.failures(good, good) == gpu_gate.failures(bad, bad) == []
    for target, kind in kinds.items():
        count = good["control"][target][kind]
        assert f"control, {target}: {kind} was {count} in the baseline, is 0" in gpu_gate.failures(
            bad, good
        )


def test_a_kernel_whose_float32_is_silently_cut_to_tf32_is_caught():
    """Triton 3.7.1 forgets "ieee" on sm_100 where one factor was bfloat16 before."""
    exact, cut = (
        measured(product, floats(dtype), floats(), floats(), 64, targets={"sm_100": 100}, warps=8)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert gpu_gate.failures(exact, exact) == []
    assert gpu_gate.failures(cut, cut) == [
        f"control, sm_100: tf32 must be 0, is {cut['control']['sm_100']['tf32']}"
    ]


ROW = {
    "registers": 40,
    "spill_bytes": 0,
    "stack_bytes": 0,
    "shared_bytes": 512,
    "wide_loads": 4,
    "wide_stores": 1,
}
ROW |= {"atomics": 0, "tf32": 0}


@pytest.mark.parametrize("quantity", ["registers", "stack_bytes", "shared_bytes"])
def test_growth_fails_in_one_line_and_less_passes(quantity):
    baseline = {"k": {"sm_80": ROW}}
    more, less = ({"k": {"sm_80": {**ROW, quantity: ROW[quantity] + by}}} for by in (1, -1))
    line = f"k, sm_80: {quantity} was {ROW[quantity]} in the baseline, is {ROW[quantity] + 1}"
    assert gpu_gate.failures(more, baseline) == [line]
    assert gpu_gate.failures(less, baseline) == gpu_gate.failures(baseline, baseline) == []


def test_launches_and_baseline_must_name_each_other():
    now = {"new": {"sm_80": ROW}}
    before = {"old": {"sm_80": ROW}}
    assert gpu_gate.failures(now, before) == [
        "new, sm_80: is not in the baseline",
        "old, sm_80: is in the baseline only",
    ]


def test_more_shared_memory_than_a_block_may_have_fails_even_with_a_baseline_that_allows_it():
    rows = {
        "k": {
            "sm_120": {**ROW, "shared_bytes": 100 << 10},
            "sm_90": {**ROW, "shared_bytes": 100 << 10},
        }
    }
    assert gpu_gate.failures(rows, rows) == [
        "k, sm_120: shared_bytes must be at most 101376, is 102400"
    ]


@pytest.fixture
def one_launch(monkeypatch, tmp_path):
    """The gate over the kernel ``copy`` only, with its own baseline."""
    monkeypatch.setattr(gpu_gate, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(gpu_gate, "TARGETS", TARGETS)
    monkeypatch.setattr(
        gpu_launches,
        "launches",
        lambda: [GpuLaunch("copy", copy, (floats(), floats(), 4096, 1024), {})],
    )
    return tmp_path / "baseline.json"


def test_update_writes_a_baseline_that_then_holds(one_launch, capsys):
    assert gpu_gate.main(["--update"]) == 0
    stored = json.loads(one_launch.read_text())
    assert stored["triton"] == triton.__version__ and list(stored["launches"]["copy"]) == list(
        TARGETS
    )
    assert gpu_gate.main([]) == 0
    stored["launches"]["copy"]["sm_90"]["registers"] -= 1
    one_launch.write_text(json.dumps(stored))
    assert gpu_gate.main([]) == 1
    assert "copy, sm_90: registers was " in capsys.readouterr().out


def test_a_baseline_of_another_compiler_is_reported_and_not_compared(one_launch, capsys):
    gpu_gate.main(["--update"])
    stored = json.loads(one_launch.read_text())
    stored["triton"] = "2.0.0"
    stored["launches"]["copy"]["sm_90"]["registers"] -= 1
    one_launch.write_text(json.dumps(stored))
    assert gpu_gate.main([]) == 0
    assert "baseline.json is of triton 2.0.0, installed is" in capsys.readouterr().out


def test_it_refuses_to_run_where_kernels_are_interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS}:{ROOT}"}
    command = [sys.executable, "-m", "support.gpu.gate"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "unset TRITON_INTERPRET" in result.stderr
