"""Random masks: their numbers, their share and their mean."""

import itertools

import numpy as np
import torch
from support.formulas import splitmix
from support.merge.delta_cases import one
from support.merges import load, merge, write

from merit_fast.merge import MergeConfig


# ---- random numbers
def test_random_numbers_are_splitmix64s():
    """The first numbers of the published C code for seed 1234567."""
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [splitmix(1234567, i) for i in range(5)] == known


def dropped(tmp_path, names, seed=0, order=(0, 1), extra=(), **options):
    """Masks of dare by (tensor, branch): branch 0 moves everything by 1, branch 1 by 16."""
    number = len(list(tmp_path.glob("run*")))
    root = tmp_path / f"run{number}"
    base = write(root / "base", {name: torch.zeros(50, 40) for name in [*extra, *names]})
    moved = [
        write(root / f"m{k}", {n: torch.full((50, 40), 16.0**k) for n in [*extra, *names]})
        for k in (0, 1)
    ]
    config = MergeConfig(method="dare_linear", density=0.5, seed=seed, **options)
    merge([moved[k] for k in order], [0.5, 0.5], root / "out", config, base)
    values = load(root / "out")
    return {
        (name, k): values[name].numpy().ravel() >= 16
        if k
        else values[name].numpy().ravel() % 16 > 0
        for name in names
        for k in (0, 1)
    }


def test_random_masks_depend_on_seed_tensor_branch_and_element_alone(tmp_path):
    first = dropped(tmp_path, ["a", "b"])
    same = dropped(tmp_path, ["b", "a"], extra=["0", "c"], threads=1, chunk_kib=4)
    assert all(np.array_equal(first[key], same[key]) for key in first)
    # other tensors, other branches
    for mask, other in itertools.combinations(first.values(), 2):
        assert 0.4 < (mask == other).mean() < 0.6
    other_seed = dropped(tmp_path, ["a", "b"], seed=1)
    assert all(0.4 < (first[key] == other_seed[key]).mean() < 0.6 for key in first)
    swapped = dropped(tmp_path, ["a", "b"], order=(1, 0))  # branches are counted, not named
    assert np.array_equal(first["a", 0], swapped["a", 1]) and np.array_equal(
        first["b", 1], swapped["b", 0]
    )


def test_the_share_that_stays_is_the_density(tmp_path):
    n = 400 * 500
    base = torch.zeros(400, 500)
    for density in (0.1, 0.5, 0.9):
        kept = (
            one(tmp_path, [torch.ones(400, 500)], base, method="dare_linear", density=density) != 0
        )
        sigma = (density * (1 - density) / n) ** 0.5
        assert abs(kept.double().mean() - density) < 5 * sigma
    ramp = torch.arange(1.0, 501).repeat(400, 1)
    kept = (
        (one(tmp_path, [ramp], base, method="della", density=0.5, epsilon=0.4) != 0)
        .double()
        .mean(0)
    )
    expected = 0.1 + 0.8 * torch.arange(500) / 499  # rising with the size, in every row
    sigma = (expected * (1 - expected) / 400).sqrt()
    assert ((kept - expected).abs() < 5 * sigma).all()


def test_what_stays_is_enlarged_so_that_the_mean_is_kept(tmp_path):
    values = torch.arange(1.0, 101).repeat(2000, 1)
    for method in ("dare_linear", "della_linear"):
        result = (
            one(tmp_path, [values], torch.zeros(2000, 100), method=method, density=0.5)
            .double()
            .mean(0)
        )
        assert ((result / values[0]).mean() - 1).abs() < 0.02
