"""Stored rows: values of any size, shards, folds of sums, damage that is refused."""

import os
import subprocess
import sys

import pytest
import torch
from support.row_store.stores import DIM, identity, write_store

import merit_fast
from merit_fast.errors import InputError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_state import SketchIdentity, SketchState


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e6, 1e30])
def test_a_row_comes_back_whatever_the_size_of_its_gradient(tmp_path, size):
    rows = torch.randn(16, DIM) * size
    rows[3] = 0
    rows[4] = 0
    rows[4, 7] = size  # one entry holds everything: the largest ratio to the root mean square
    stored = merit_fast.open_rows(write_store(tmp_path, {"a": rows})).dataset("a")
    back = torch.cat([stored.vectors.take(torch.arange(16).numpy())])
    error = (back.double() - rows.double()).norm(dim=1)
    assert (error <= 4e-4 * rows.double().norm(dim=1)).all()
    assert torch.equal(back[3], torch.zeros(DIM)) and stored.norm[3] == 0
    assert torch.allclose(stored.norm, rows.double().norm(dim=1), rtol=1e-3)
    assert torch.allclose(stored.square_norm, rows.double().square().sum(1))


@pytest.mark.parametrize("batch,shard_rows", [(1, 1), (5, 7), (8, 3), (40, 7), (40, 100)])
def test_shards_and_batches_of_any_size_hold_the_rows_in_order(tmp_path, batch, shard_rows):
    rows = torch.randn(23, DIM)
    folder = write_store(tmp_path, {"a": rows}, batch=batch, shard_rows=shard_rows)
    stored = merit_fast.open_rows(folder).dataset("a")
    assert [len(shard) for shard in stored.vectors.shards[:-1]] == [shard_rows] * (22 // shard_rows)
    assert stored.row.tolist() == list(range(23)) and stored.place.tolist() == [0] * 23
    assert stored.loss_sum.tolist() == [i / 4 for i in range(23)]
    assert stored.num_target_tokens.tolist() == [i % 5 + 1 for i in range(23)]
    chosen = torch.tensor([22, 0, 7, 6, 7])
    assert torch.allclose(stored.vectors.take(chosen.numpy()), rows[chosen], atol=3e-3)


@pytest.mark.parametrize("dim,width", [(8192, 4096), (65536, 8192), (12288, 8192)])
def test_the_fold_of_a_sum_is_the_sum_of_the_folds(tmp_path, dim, width):
    rows = torch.randn(20, dim)
    of = identity(dim, width)
    folds = of.fold(rows)
    assert folds.shape == (20, width)
    whole = of.fold(rows.double().sum(0, keepdim=True))[0]
    assert float((folds.double().sum(0) - whole).norm() / whole.norm()) < 1e-6
    stored = merit_fast.open_rows(write_store(tmp_path, {"a": rows}, of)).vectors("a")
    back = stored.take(torch.arange(20).numpy()).double().sum(0)
    assert float((back - whole).norm() / whole.norm()) < 5e-4  # float16


def test_folds_keep_inner_products_with_the_variance_of_both_sketches():
    u, v = torch.randn(2, 8192)
    u /= u.norm()
    v = 0.5 * u + v / v.norm()
    found = []
    for seed in range(200):
        sketch = SketchIdentity(CountSketch(8192, seed), "model", ("weight",))
        folds = type(identity()).of(sketch, 4096).fold(torch.stack([u, v])).double()
        found.append(float(folds[0] @ folds[1]))
    exact = float(u.double() @ v.double())
    spread = float(torch.tensor(found).std())
    law = ((float(v.norm()) ** 2 + exact**2) / 4096) ** 0.5
    assert abs(sum(found) / 200 - exact) < 4 * law / 200**0.5
    assert 0.5 * law < spread < 1.2 * law


def test_a_width_of_the_whole_sketch_keeps_it_as_it_is():
    rows = torch.randn(3, DIM)
    assert torch.equal(identity().fold(rows), rows)


def test_one_file_holds_at_most_64_mib_and_memory_one_shard(tmp_path):
    of = identity(65536, 65536)
    rows = torch.randn(1, 65536).expand(600, 65536)
    folder = write_store(tmp_path, {"a": rows}, of, batch=100, shard_rows=512)
    sizes = [file.stat().st_size for file in (folder / "sketch/rows/a").glob("*.safetensors")]
    assert len(sizes) == 2 and max(sizes) < (64 << 20) + 65536


def test_another_process_reads_a_store_that_it_may_not_write(tmp_path):
    folder = write_store(tmp_path, {"a": torch.randn(9, DIM)})
    for path in (folder / "sketch/rows/a").iterdir():
        path.chmod(0o444)
    code = (
        "import sys, merit_fast\n"
        "rows = merit_fast.open_rows(sys.argv[1])\n"
        "print(len(rows), [hit.row for hit in rows.search([('a', 3)], k=2)])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, "-c", code, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    mine = [hit.row for hit in merit_fast.open_rows(folder).search([("a", 3)], k=2)]
    assert result.stdout.strip() == f"9 {mine}"


def test_what_is_no_store_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="run first: merit-fast sketch CONFIG.yml --store"):
        merit_fast.open_rows(tmp_path)
    folder = write_store(tmp_path, {"a": torch.randn(9, DIM)})
    rows = folder / "sketch" / "rows" / "a"
    shard = rows / "00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(InputError, match="00001.safetensors: is not a shard"):
        merit_fast.open_rows(folder)
    shard.unlink()
    with pytest.raises(InputError, match="00001.safetensors: is not a shard"):
        merit_fast.open_rows(folder)
    shard.write_bytes(content)
    index = (rows / "index.json").read_text()
    (rows / "index.json").write_text(index.replace('"hash_version": "3"', '"hash_version": "2"'))
    with pytest.raises(InputError, match="hash_version: must be 3, found 2; sketch again"):
        merit_fast.open_rows(folder)
    (rows / "index.json").unlink()
    with pytest.raises(InputError, match="must hold complete rows"):
        merit_fast.open_rows(folder)


def test_datasets_of_different_sketches_are_refused(tmp_path):
    write_store(tmp_path, {"a": torch.randn(3, DIM)})
    write_store(tmp_path, {"b": torch.randn(3, DIM)}, identity(model="another"))
    with pytest.raises(InputError, match="model_fingerprint: must be 'model', found 'another'"):
        merit_fast.open_rows(tmp_path)


def test_a_row_that_is_not_finite_is_never_stored(tmp_path):
    rows = torch.randn(3, DIM)
    rows[1, 5] = float("inf")
    with pytest.raises(merit_fast.MeritFastError, match="must be finite, found NaN or infinity"):
        write_store(tmp_path, {"a": rows})


@pytest.mark.parametrize("weight", ["tokens", "examples"])
def test_the_state_of_the_same_rows_is_a_target(tmp_path, weight):
    rows = torch.randn(24, DIM) + 0.3
    of = SketchIdentity(CountSketch(DIM), "model", ("weight",), weight)
    state = SketchState.zeros(of, 8)
    state.add_examples(rows, torch.arange(24) % 8, 0.0, torch.arange(24) % 5 + 1)
    folder = write_store(tmp_path, {"a": rows, "b": torch.randn(9, DIM)})
    opened = merit_fast.open_rows(folder)
    by_state = opened.search(state, k=40, by="dot")
    by_name = opened.search("a", k=40, by="dot", weight=weight, leave_own_out=False)
    expected = {(hit.dataset, hit.row): hit for hit in by_name}
    assert {(hit.dataset, hit.row) for hit in by_state} == expected.keys()
    for hit in by_state:  # the state knows the rows before they became float16
        other = expected[hit.dataset, hit.row]
        assert hit.score == pytest.approx(other.score, rel=2e-3, abs=0.1)
        assert hit.error == pytest.approx(other.error, rel=0.02, abs=0.1)
    other = SketchState.zeros(SketchIdentity(CountSketch(DIM, 1), "model", ("weight",)), 8)
    other.add_examples(rows, torch.arange(24) % 8)
    with pytest.raises(InputError, match="seed: must be '0', found '1'"):
        opened.search(other)
