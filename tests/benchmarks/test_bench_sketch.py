"""The sketch's benchmarks: rounds, resume, refusal, tables, absent peers, and their checks."""

import importlib
import json
import sys

import pytest
import torch
from support.paths import ROOT

from merit_fast.kernels.sketch import CountSketch, flat_sketch


@pytest.fixture
def bench(monkeypatch, capfd):
    """Runs a script in this process, since importing torch takes longer; returns its output."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        importlib.import_module(f"bench.{name}").main()
        return "".join(capfd.readouterr())

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"bench.{name}")


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_steps_are_measured_kept_and_not_repeated(bench, tmp_path, tiny_model):
    options = (
        tmp_path,
        "--quick",
        "--threads",
        "1",
        "--only",
        "31m,moe,smollm",
        "--model",
        tiny_model,
    )
    text = bench("sketch.step", *options, "--rounds", "1")
    rounds = [record["round"] for record in records(tmp_path / "sketch_step-quick.jsonl")[1:]]
    names = [entry["case"] for entry in rounds]
    assert names == [
        *(f"31m, {d}, T={t}, 1 thread(s)" for d in ("fp32", "bf16") for t in (16, 24)),
        *(f"MoE, {d}, T=16, 1 thread(s)" for d in ("fp32", "bf16")),
        names[-1],
    ]
    assert list(rounds[0]["rows"]) == [
        "plain",
        "frozen",
        "sketch",
        "sketch, first pass",
        "plain, oneDNN",
        "sketch, oneDNN",
        "training",
        "training + sum",
    ]
    assert all(row["cpu_s"] > 0 for entry in rounds for row in entry["rows"].values())
    assert "| SmolLM2-135M, bf16, 1 thread(s): sketch | wall " in text and "round 1" in text
    again = bench("sketch.step", *options, "--rounds", "1")
    assert "round 1" not in again and again in text


def test_memory_is_of_a_process_of_its_own_and_a_large_model_is_built_in_place(bench):
    sketch = json.loads(
        bench("sketch.memory", "sketch", "--quick", "--tokens", "16").splitlines()[-1]
    )
    assert sketch["before_mib"] <= sketch["high_mib"]
    large = json.loads(bench("sketch.memory", "7b", "--quick").splitlines()[-1])
    assert large["weights_mib"] == large["parameters"] * 2 / 2**20


def test_accuracy_is_that_of_the_gradients_it_keeps(bench, tmp_path, tiny_model):
    options = (tmp_path, "--quick", "--model", tiny_model, "--examples", "2", "--proj-dims", "4096")
    text = bench("sketch.accuracy.__main__", *options, "--seeds", "2")
    assert "| 4096 | 2 | " in text and "8 tasks, 28 pairs" in text
    kept = records(tmp_path / "sketch_accuracy.jsonl")
    gradients = torch.stack(
        [torch.from_file(str(f), size=f.stat().st_size // 4) for f in files_of(kept, tmp_path)]
    )
    exact = sum(
        torch.tensor(value) for record in kept for value in record.get("exact", {}).values()
    )
    assert torch.allclose(exact.double(), gradients.double() @ gradients.double().T, rtol=1e-5)
    strided = [record["strided"] for record in kept if "strided" in record]
    assert [entry["offset"] for entry in strided] == [0, 1, 2, 3, 4]
    assert sum(entry["floats"] for entry in strided) == gradients.shape[1]
    fifth = gradients[:, 3::5].double()
    assert torch.allclose(torch.tensor(strided[3]["products"]).double(), fifth @ fifth.T, rtol=1e-5)
    assert "| every fifth entry, from 3 on | " in text and "| sketch, 2 seeds | 4,096 | " in text
    more = bench("sketch.accuracy.__main__", *options, "--seeds", "3")
    assert "gradient of" not in more and "| 4096 | 3 | " in more
    other = (*options[:-3], "3", *options[-2:])
    with pytest.raises(SystemExit, match="was measured with another examples"):
        bench("sketch.accuracy.__main__", *other)


def files_of(kept, folder):
    return [
        folder / f"{record['gradient']['task']}.2.f32" for record in kept if "gradient" in record
    ]


@pytest.mark.parametrize("buckets", [1, 2, 7, 8, 16])
def test_the_layout_of_this_version_is_that_of_the_kernels(module, buckets):
    layouts = module("sketch.layouts")
    layout = module("sketch.layout")
    gradient = torch.randint(-8, 9, (2, 320, 448)).float()
    sketch = CountSketch(buckets * 4096, 3)
    draw = layouts.LAYOUTS["rectangles, high bits by strip (version 3)"]
    dense = layouts.sketch(layout.dense(gradient), 448, 3, sketch.proj_dim, draw)
    assert torch.equal(dense, flat_sketch(gradient, "w", sketch))
    rows = layouts.sketch(layout.some_rows([7, 99], gradient[:, :2]), 448, 3, sketch.proj_dim, draw)
    ids = torch.tensor([[7, 99]] * 2)
    assert torch.equal(rows, flat_sketch(gradient[:, :2], "w", sketch, row_ids=ids))


def test_layouts_are_tabled_for_made_and_real_gradients(bench, tiny_model):
    text = bench("sketch.layout", "--draws", "2", "--model", tiny_model)
    lines = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ")]
    draws = {name.strip(): draws.strip() for name, draws in lines}
    assert draws["dense, 512 x 512"] == "2" and draws["one row of 4096"] == "8"
    assert any(name.startswith("SmolLM2: rows of the embedding") for name in draws)


def test_calls_are_timed_and_named_as_json_for_a_comparison(bench):
    text = bench("sketch.calls", "--only", "8x128x576 bf16", "--seconds", "0", "--threads", "1")
    figures = json.loads(text.splitlines()[-1])
    assert list(figures) == ["embedding 8x128x576 bf16", "vector 8x128x576 bf16"]
    assert all(value > 0 for value in figures.values())


def test_a_missing_peer_is_reported_and_the_others_run(bench, tmp_path):
    (tmp_path / "peers").mkdir()
    options = ("--quick", "--rounds", "1", "--threads", "1", "--peers", tmp_path / "peers")
    text = bench("sketch.peers", tmp_path / "out", *options, "--only", "merit-fast,opacus")
    assert "| merit-fast, all parameters to 65536 | " in text
    assert f"| opacus | failed: {tmp_path}/peers: is not an environment" in text


def test_the_loop_over_examples_is_checked_and_timed_with_the_plain_step(bench):
    times = json.loads(
        bench("sketch.peer_steps", "less", "--quick", "--rounds", "2").splitlines()[-1]
    )
    steps = {name.split("/")[1] for name in times}
    assert steps == {
        "plain",
        "loop over examples, nothing projected",
        "loop over examples, index_add_ to 65536",
    }
    assert len(times) == 2 * 3 * 2


def test_a_wrong_result_ends_the_benchmark(module):
    libraries = module("sketch.peer_libraries")
    truth = torch.randn(10)
    libraries.expect(truth, truth, "right")
    with pytest.raises(SystemExit, match="wrong: is off by 1.0e-02"):
        libraries.expect(truth * 1.01, truth, "wrong")


def test_onednn_s_step_has_the_gradients_of_the_plain_one(module):
    work_module = module("sketch.work")
    work = work_module.token_work(work_module.small_model("fp32", quick=True), 3, 9)
    plain = work_module.exact_gradients(work, 1)
    with work_module.onednn(work):
        onednn = work_module.exact_gradients(work, 1)
    for name, gradient in plain.items():
        assert work_module.relative_error(onednn[name], gradient) < 1e-5, name
    again = work_module.exact_gradients(work, 1)
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


def test_a_goal_is_reached_only_where_wall_and_cpu_reach_it(module):
    report = module("sketch.step_report")
    rows = {"plain": {"wall_s": 1.0, "cpu_s": 1.0}, "sketch": {"wall_s": 0.8, "cpu_s": 0.95}}
    case = "31m, fp32, T=128, 1 thread(s)"

    class Found:
        def of(self, kind):
            return [{"case": case, "rows": rows}] if kind == "round" else []

    circumstances = {"machine": {"cores": 1}, "version": "x", "proj_dim": 65536}
    missed = report.report(Found(), circumstances)
    assert f"| {case}: sketch | wall 0.800, CPU 0.950 | <= 0.90 | **missed** |" in missed
    rows["sketch"]["cpu_s"] = 0.9
    assert "CPU 0.900 | <= 0.90 | reached |" in report.report(Found(), circumstances)
