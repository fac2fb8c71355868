"""A launch's fingerprint changes with all that changes its code, and with nothing else."""

import ast
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from support.gpu import code as gpu_code
from support.gpu import fingerprint as gpu_fingerprint
from support.gpu import gate as gpu_gate
from support.gpu.code import GpuLaunch, compile_launch
from support.gpu.fingerprint import fingerprint

pytestmark = pytest.mark.compile

TWO_TARGETS = {"sm_90": 90, "gfx942": "gfx942"}

SOURCE = """
import triton
import triton.language as tl

STEP = tl.constexpr(3)

@triton.jit
def helper(x):
    return x * 2

@triton.jit
def kernel(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, helper(tl.load(x + at, mask=at < n)) + STEP, mask=at < n)
"""


def written(folder, source):
    """The module's kernel, from a file of its own; Triton reads the source of files only."""
    file = folder / "kernels.py"
    file.write_text(source)
    names = {"__name__": "kernels"}
    exec(compile(source, str(file), "exec"), names)
    return names["kernel"]


def floats(dtype=torch.float32, shift=0):
    return torch.zeros(4096 + shift, dtype=dtype)[shift:]


def printed(kernel, x=None, n=1024, size=1024, warps=4, architecture=90):
    x = floats() if x is None else x
    return fingerprint(kernel, (x, floats(), n, size), {"num_warps": warps}, architecture)


@pytest.fixture
def kernel(tmp_path):
    return written(tmp_path, SOURCE)


CHANGES = {
    "its own line": ("at < n)) +", "at <= n)) +"),
    "a function that it calls": ("x * 2", "x * 3"),
    "a constant that it names": ("constexpr(3)", "constexpr(4)"),
}


@pytest.mark.parametrize("old,new", CHANGES.values(), ids=CHANGES.keys())
def test_another_source_is_another_fingerprint(old, new, kernel, tmp_path):
    assert old in SOURCE
    (tmp_path / "other").mkdir()
    assert printed(written(tmp_path / "other", SOURCE.replace(old, new))) != printed(kernel)


def test_comments_docstrings_and_places_are_no_part_of_it(kernel, tmp_path):
    (tmp_path / "other").mkdir()
    lines = SOURCE.replace("def helper(x):", 'def helper(x):\n    """Doubles."""  # exact\n')
    moved = written(tmp_path / "other", "\n\n# Moved down.\n" + lines)
    assert moved.cache_key != kernel.cache_key  # Triton's own key counts lines
    assert printed(moved) == printed(kernel)


def test_types_alignments_constants_options_and_targets_are_part_of_it(kernel):
    launches = [
        {},
        {"x": floats(torch.bfloat16)},
        {"x": floats(shift=1)},
        {"n": 1023},
        {"n": 1},
        {"size": 512},
        {"warps": 8},
        {"architecture": 80},
        {"architecture": "gfx942"},
    ]
    assert len({printed(kernel, **launch) for launch in launches}) == len(launches)
    assert printed(kernel, n=2048) == printed(kernel, n=1024)  # both are multiples of 16


def test_the_module_that_reads_code_is_part_of_it(kernel, monkeypatch):
    before = printed(kernel)
    monkeypatch.setattr(gpu_fingerprint, "reader", lambda: "another reader")
    assert printed(kernel) != before
    text = 'def f():\n    """Doc."""\n    return 1  # one\n'
    assert gpu_fingerprint.plain_source(ast.parse(text)) == "def f():\n    return 1"


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """The launches that are really compiled from now on, with an empty store."""
    architectures = []
    build = gpu_code.build

    def counted(kernel, arguments, options, architecture):
        architectures.append(architecture)
        return build(kernel, arguments, options, architecture)

    monkeypatch.setattr(gpu_code, "STORE", tmp_path / "store")
    monkeypatch.setattr(gpu_code, "build", counted)
    monkeypatch.setattr(gpu_gate, "build", counted)
    return architectures


def test_code_is_compiled_once_and_comes_back_from_the_store_whole(kernel, builds):
    arguments = (floats(), floats(), 1024, 1024)
    first, second = (compile_launch(kernel, arguments, {}, 90) for _ in range(2))
    assert builds == [90] and second == first and first.count("LDG") > 0
    compile_launch(kernel, (floats(torch.bfloat16), *arguments[1:]), {}, 90)
    assert builds == [90, 90]


@pytest.fixture
def two_launches(kernel):
    """Two launches of one kernel: the first is the sample, for sm_90."""
    return [
        GpuLaunch(name, kernel, (floats(), floats(), 1024, size), {})
        for name, size in (("long", 1024), ("short", 512))
    ]


def test_only_the_sample_and_changed_launches_are_compiled(two_launches, builds):
    rows = gpu_gate.measure(two_launches, TWO_TARGETS)
    prints = {
        launch.name: {name: launch.fingerprint(at) for name, at in TWO_TARGETS.items()}
        for launch in two_launches
    }
    assert gpu_gate.sample(two_launches, TWO_TARGETS) == {("long", "sm_90")}
    baseline = gpu_gate.Baseline(rows, prints)
    builds.clear()
    assert gpu_gate.measure_changed(two_launches, TWO_TARGETS, baseline) == (rows, set())
    assert builds == [90]
    prints["short"]["gfx942"] = "of another source"
    for compiled in ([90, "gfx942"], [90]):  # then from the store
        builds.clear()
        again, changed = gpu_gate.measure_changed(two_launches, TWO_TARGETS, baseline)
        assert (again, changed) == (rows, {("short", "gfx942")})
        assert builds == compiled


def test_every_launch_is_compiled_where_no_baseline_applies(two_launches, builds):
    _, changed = gpu_gate.measure_changed(two_launches, TWO_TARGETS, None)
    assert len(builds) == len(changed) == 4


def test_a_launch_that_does_not_compile_is_named(tmp_path):
    broken = written(tmp_path, SOURCE.replace("x * 2", "x * undefined"))
    launch = GpuLaunch("broken", broken, (floats(), floats(), 1024, 1024), {})
    with pytest.raises(Exception) as error:
        gpu_gate.measure([launch], {"sm_90": 90})
    assert error.value.__notes__ == ["broken does not compile for sm_90"]
