"""The benchmarks of the search and the projector: tables, peers, and wrong results."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from support.paths import ROOT


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    yield lambda name: importlib.import_module(f"bench.search.{name}")
    torch.set_num_threads(threads)


@pytest.fixture
def peers(module, monkeypatch):
    """Modules as TRAK's and dattri's, whose dense projectors have no blocks."""
    projectors = module("projectors")

    class Dense:
        def __init__(self, grad_dim, proj_dim, seed, proj_type, device):
            numbers = torch.Generator().manual_seed(seed)
            self.matrix = torch.randn(grad_dim, proj_dim, generator=numbers)

        def project(self, grads, model_id):
            return grads @ self.matrix

    class Normalized(Dense):
        def project(self, grads, model_id):
            return grads @ self.matrix / self.matrix.shape[1] ** 0.5

    kinds = SimpleNamespace(rademacher="rademacher")
    modules = {
        name: SimpleNamespace(AbstractProjector=object, BasicProjector=dense, ProjectionType=kinds)
        for name, dense in (("TRAK", Dense), ("dattri", Normalized))
    }
    monkeypatch.setattr(projectors, "load_peers", lambda directory: modules)
    return projectors


def run(script, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    script.main()
    return capsys.readouterr().out


def test_the_search_is_timed_next_to_reading_the_rows_and_its_peers(module, monkeypatch, capsys):
    rows = module("rows")
    text = run(rows, monkeypatch, capsys, "--rows", "300", "--width", "64", "--rounds", "2")
    for threads in (1, 2):
        assert f"| {threads} thread(s) | ms | GB/s | of the floor |" in text
    assert text.count("| row_products, one target |") == 2
    assert text.count("| 1.00 |") >= 2  # the floor itself


def test_wrong_products_end_the_run(module):
    rows = module("rows")
    stored = rows.stored_rows(20, 64)
    vector = torch.randn(64)
    rows.check("right", lambda: stored.float() @ vector, stored, vector)
    with pytest.raises(SystemExit, match="wrong: products are off by"):
        rows.check("wrong", lambda: stored.float() @ vector * 1.001, stored, vector)


def test_projectors_are_timed_with_the_error_of_each(peers, monkeypatch, capsys):
    arguments = ("--grad-dim", "3000", "--proj-dim", "500", "--rounds", "1", "--theirs", "100")
    text = run(peers, monkeypatch, capsys, *arguments)
    lines = [line.split("|") for line in text.splitlines() if "BasicProjector" in line]
    assert len(lines) == 4 and all("100 numbers" in line[1] for line in lines)
    assert all(0.5 < float(line[4]) < 1.6 for line in lines)  # 28 pairs


def test_a_projector_of_another_scale_ends_the_run(peers):
    grads = peers.gradients(8, 3000)
    wrong = {peers.OURS: lambda g: 3 * torch.ones(len(g), 500)}
    assert peers.rms_error(grads, grads) < 1e-3
    with pytest.raises(SystemExit, match="merit_fast: inner products are off by"):
        peers.measure(wrong, 1e-3 * grads, 1, 500)
