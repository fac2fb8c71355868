"""The GPU benchmark without a GPU: cases hold on the CPU, wrong results are caught."""

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.paths import ROOT

from bench.gpu import __main__ as gpu
from bench.gpu import average as gpu_average
from bench.gpu import cross_entropy as gpu_cross_entropy
from bench.gpu import sketch as gpu_sketch
from merit_fast.kernels import dispatch

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    dispatch.native_module() is None, reason="the native kernels were not built"
)


@pytest.fixture(scope="module")
def report():
    return gpu.run(CPU, None)


def test_every_case_holds_on_the_cpu(report):
    assert [row for row in report["checks"] if row["wrong"]] == report["not_run"] == []
    assert {row["op"] for row in report["checks"]} == {op.name for op in gpu.OPS}
    assert {"fp32", "bf16"} <= {row["dtype"] for row in report["checks"]}
    assert gpu.exit_code(report) == 0


def test_every_op_with_a_gpu_kernel_has_an_entry():
    with_kernel = {
        row for row, backends in dispatch.OPS.items() if {"triton", "cuda"} & set(backends)
    }
    assert with_kernel <= {op.row for op in gpu.OPS} <= set(dispatch.OPS)


def spoiled(op, spoil):
    """``op`` in its first cases; ``spoil`` changes the results of every backend but eager."""

    def small(device):
        for case in itertools.islice(op.small(device), 3):
            yield replace(
                case,
                run=lambda backend, run=case.run: (
                    run(backend)
                    if backend == "eager"
                    else [spoil(result.clone()) for result in run(backend)]
                ),
            )

    return replace(op, small=small)


def one_entry_off(result):
    if len(result):
        result.view(-1)[-1] += 0.01 * (1 + result.abs().max())
    return result


def rounded_to_tf32(result):
    return (result.float().view(torch.int32) & ~0x1FFF).view(torch.float32)


def never_the_same(result):
    return result * (1 + torch.rand(()) * 1e-6)


def raises(result):
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize("op", gpu.OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(
    "spoil,words",
    [
        (one_entry_off, "relative error"),
        (torch.zeros_like, "relative error 1.0e+00"),
        (lambda result: result * float("nan"), "relative error nan"),
        (raises, "RuntimeError: no kernel image"),
    ],
    ids=["one-entry", "zeros", "nan", "raises"],
)
def test_a_wrong_op_is_named_and_fails_the_run(op, spoil, words, monkeypatch):
    monkeypatch.setattr(gpu, "OPS", [spoiled(op, spoil)])
    said = []
    report = gpu.run(CPU, None, said.append)
    assert gpu.exit_code(report) == 1
    assert said and all(line.startswith(f"WRONG {op.name}, ") and words in line for line in said)


@pytest.mark.parametrize("op", gpu.OPS[1:], ids=lambda op: op.name)
def test_sketches_of_tf32_precision_and_of_changing_bits_are_wrong(op, monkeypatch):
    for spoil, words in (
        (rounded_to_tf32, "relative error"),
        (never_the_same, "two runs gave different bits"),
    ):
        monkeypatch.setattr(gpu, "OPS", [spoiled(op, spoil)])
        said = []
        assert gpu.exit_code(gpu.run(CPU, None, said.append)) == 1
        assert any(words in line for line in said)


def test_right_results_are_timed_with_their_peers_and_wrong_ones_are_not(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    sound, broken = (
        replace(op, large=op.small) for op in (gpu.OPS[0], spoiled(gpu.OPS[2], torch.zeros_like))
    )
    peer = {"liger-kernel": lambda: [][0]}
    with_peer = replace(
        sound, large=lambda device: (replace(c, peers=peer) for c in [next(sound.small(device))])
    )
    monkeypatch.setattr(gpu, "OPS", [with_peer, broken])
    ceilings = {"bytes_per_s": 1e9, "fp32_operations_per_s": 1e12, "bf16_operations_per_s": 1e12}
    monkeypatch.setattr(
        gpu, "measure_ceilings", lambda device, timer: {**ceilings, "mixed_operations_per_s": 1e12}
    )
    report = gpu.run(CPU, lambda run: 0.25, lambda line: None)
    ours, liger = (row for row in report["times"] if row["op"] == sound.name)
    assert ours["by"] == "cpu" and ours["seconds"] == 0.25 and ours["floor_s"] > 0
    assert liger["by"] == "liger-kernel" and liger["failed"].startswith("IndexError")
    assert not any(row["op"] == broken.name and row["by"] == "cpu" for row in report["times"])
    lines = list(gpu.report_lines(report))
    assert any("250.000" in line for line in lines) and any("IndexError" in line for line in lines)


def test_peers_compute_what_the_op_computes():
    dy = torch.randn(2, 9, 70)
    x = torch.randn(2, 9, 130)
    ids = torch.randint(0, 50, (2, 9))
    cases = [
        gpu_average.case("", [[torch.randn(5)] for _ in range(3)], "fp32", timed=True),
        gpu_sketch.flat("", torch.randn(1, 70, 130), 12288, "fp32", timed=True),
        gpu_sketch.linear("", dy, x, 12288, "fp32", timed=True),
        gpu_sketch.embedding("", dy, ids, 50, 12288, "fp32", timed=True),
    ]
    for case in cases:
        name = next(name for name in case.peers if name.startswith("eager"))
        result = case.peers[name]()
        result = (
            result
            if isinstance(result, list)
            else [result.view(len(result.flatten()) // 12288, 12288)]
        )
        assert max(gpu.errors(result, case.truth())) < 1e-6
        assert "torch.compile" in case.peers and case.moved_bytes and case.operations


@pytest.mark.parametrize("make", [gpu_cross_entropy.case, gpu_cross_entropy.statistics_case])
def test_peers_of_a_head_compute_its_gradients(make):
    case = make("", 37, 45, 1003, "fp32", CPU, timed=True)
    gradients = case.truth()[2:]
    assert max(gpu.errors(case.peers["eager"](), gradients)) < 1e-6
    assert "torch.compile" in case.peers and case.moved_bytes and case.operations


def test_ceilings_are_of_bytes_and_of_operations():
    ceilings = gpu.measure_ceilings(CPU, lambda run: (run(), 0.5)[1], size=1 << 10, side=8)
    rates = {
        "bytes_per_s": 2 * 1024 / 0.5,
        "fp32_operations_per_s": 2048.0,
        "bf16_operations_per_s": 2048.0,
    }
    assert ceilings == rates


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_reports_that_and_exits_with_0(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--json", tmp_path / "out.json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and not (tmp_path / "out.json").exists()
    assert (
        result.stdout
        == "bench.gpu: no GPU here: nothing was checked, nothing was timed, nothing is claimed\n"
    )


def test_a_run_that_checked_nothing_fails(monkeypatch):
    said = []
    monkeypatch.setattr(dispatch, "unavailable", lambda op, backend, device: "is not installed")
    report = gpu.run(CPU, None, said.append)
    assert gpu.exit_code(report) == 1 and said[0].startswith(
        "NOT RUN foreach_weighted_average: backend cpu is not"
    )
