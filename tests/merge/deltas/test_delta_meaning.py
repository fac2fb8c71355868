"""Shares, ties, signs and scales of the methods that thin deltas."""

import pytest
import torch
from support.merge.delta_cases import one


@pytest.mark.parametrize("density,kept", [(0.0, 0), (1e-9, 1), (0.25, 25), (0.999, 99), (1.0, 100)])
def test_ties_keeps_exactly_its_share_and_at_least_one(tmp_path, density, kept, backend):
    for values in (torch.randn(100), torch.ones(100)):
        result = one(tmp_path, [values], torch.zeros(100), method="ties", density=density)
        assert int((result != 0).sum()) == kept
        assert torch.equal(result[result != 0], values[result != 0])


def test_among_equal_sizes_the_first_stay(tmp_path, backend):
    values = torch.tensor([1.0, -2.0, 1.0, -1.0, 2.0, -1.0, 1.0, 3.0])
    kept = one(tmp_path, [values], torch.zeros(8), method="ties", density=5 / 8)
    assert kept.tolist() == [1.0, -2.0, 1.0, 0.0, 2.0, 0.0, 0.0, 3.0]
    middle = one(
        tmp_path, [values], torch.zeros(8), method="breadcrumbs", density=4 / 8, gamma=2 / 8
    )
    assert middle.tolist() == [
        1.0,
        0.0,
        1.0,
        -1.0,
        2.0,
        0.0,
        0.0,
        0.0,
    ]  # 3 and the first 2 go, the last ones too


def test_breadcrumbs_drops_the_largest_then_the_smallest(tmp_path, backend):
    values = torch.arange(1.0, 11)
    for gamma, expected in [
        (0.2, [4.0, 5, 6, 7, 8]),
        (0.0, [6.0, 7, 8, 9, 10]),
        (0.7, [1.0, 2, 3, 4, 5]),
    ]:
        result = one(
            tmp_path, [values], torch.zeros(10), method="breadcrumbs", density=0.5, gamma=gamma
        )
        assert (
            result[result != 0].tolist() == expected
        )  # gamma 0.7: only so many of the largest go as leave half
    everything = one(
        tmp_path, [values], torch.zeros(10), method="breadcrumbs", density=1.0, gamma=0.3
    )
    assert torch.equal(everything, values)


def test_the_sign_of_the_sum_is_elected_and_a_zero_sum_elects_plus(tmp_path, backend):
    models = [torch.tensor([3.0, 1.0, -1.0, 0.0]), torch.tensor([-1.0, -1.0, -4.0, -2.0])]
    result = one(tmp_path, models, torch.zeros(4), [0.5, 0.5], method="ties", density=1.0)
    assert result.tolist() == [3.0, 1.0, -2.5, -2.0]
    plain = one(
        tmp_path, models, torch.zeros(4), [0.5, 0.5], method="ties", density=1.0, normalize=False
    )
    assert plain.tolist() == [1.5, 0.5, -2.5, -1.0]
    weighty = one(tmp_path, models, torch.zeros(4), [0.2, 0.8], method="ties", density=1.0)
    assert weighty.tolist() == pytest.approx([-1.0, -1.0, -3.4, -2.0])  # weights vote too


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_density_0_gives_the_base_and_1_the_whole_delta(tmp_path, method, backend):
    base = torch.randn(4, 25)
    models = [torch.randn(4, 25), torch.randn(4, 25)]
    assert torch.equal(one(tmp_path, models, base, method=method, density=0.0), base)
    whole = one(tmp_path, models, base, method=method, density=1.0)
    known = {"della": "ties", "dare_ties": "ties"}.get(method, "task_arithmetic")
    options = {"density": 1.0} if known == "ties" else {}
    truth = one(tmp_path, models, base, method=known, **options)
    torch.testing.assert_close(whole, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_linear", "della", "sce"])
def test_scale_multiplies_the_step_from_the_base(tmp_path, method, backend):
    base = torch.randn(8, 25).double()
    models = [torch.randn(8, 25).double() for _ in range(2)]
    options = {} if method == "sce" else {"density": 0.6}
    full = one(tmp_path, models, base, method=method, **options) - base
    half = one(tmp_path, models, base, method=method, scale=0.5, **options) - base
    assert full.abs().max() > 0
    torch.testing.assert_close(half, full / 2, rtol=0, atol=1e-14)
    assert torch.equal(one(tmp_path, models, base, method=method, scale=0.0, **options), base)


def test_sce_weighs_branches_by_their_squares(tmp_path, backend):
    models = [torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([3.0, -1.0, 0.0, 2.0])]
    result = one(tmp_path, models, torch.zeros(4), method="sce")
    q = (2 / 16, 14 / 16)
    # in the second place the plain deltas cancel, so plus is elected, though the second branch
    # weighs more
    assert result.tolist() == pytest.approx([q[0] + 3 * q[1], 1.0, 0.0, 2.0])
    half = one(
        tmp_path, models, torch.zeros(4), method="sce", select_topk=0.4
    )  # 1 of the 3 that vary: the first
    assert half.tolist() == pytest.approx([1 / 10 + 3 * 9 / 10, 0.0, 0.0, 0.0])
    assert (
        one(tmp_path, [models[0]] * 2, torch.zeros(4), method="sce", select_topk=0.5).tolist()
        == [0.0] * 4
    )
