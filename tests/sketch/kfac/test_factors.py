"""Factors of K-FAC as things: kept in files, fingerprinted, refused where they cannot be right."""

import pytest
import torch
from support.checks import assert_close
from support.sketch.odd_modules import TimeFirst
from torch import nn

import merit_fast
from merit_fast.errors import InputError, MeritFastError
from merit_fast.sketch.precondition import KfacFactors


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def losses(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randint(0, 11, (4, 3), generator=generator)).square().sum((1, 2))


def collected(model, seeds=(0, 1), damping=0.1, **options):
    with merit_fast.kfac_factors(model, **options) as collector:
        for seed in seeds:
            losses(model, seed).sum().backward()
            collector.update()
    return collector.factors(damping)


def sketched(model, factors, seed=3, **options):
    options = dict(proj_dim=4096, check="always") | options
    with merit_fast.sketch_gradients(
        model, normalize="kfac", factors=factors, **options
    ) as sketcher:
        losses(model, seed).sum().backward()
        sketcher.update(["a"] * 4)
    return sketcher


def test_a_file_gives_the_same_sketches(tmp_path):
    model = small()
    factors = collected(model)
    factors.save(tmp_path / "factors.safetensors")
    loaded = KfacFactors.load(tmp_path / "factors.safetensors")
    first = sketched(model, factors)
    second = sketched(model, loaded)
    assert torch.equal(first.state["a"].block_sums, second.state["a"].block_sums)
    assert first.identity == second.identity
    assert (loaded.examples, loaded.damping) == (8, 0.1)
    assert loaded.num_bytes == 4 * (11 + 36 + 25 + 36 + 9 + 25 + 5 + 5 + 5 + 3)


@pytest.mark.parametrize("other", ["plain", "rows", "damping"])
def test_states_of_other_factors_are_not_added(other):
    model = small()
    state = sketched(model, collected(model)).state["a"]
    factors = {"rows": collected(model, (0, 2)), "damping": collected(model, damping=0.2)}
    if other == "plain":
        with merit_fast.sketch_gradients(model, proj_dim=4096) as sketcher:
            losses(model).sum().backward()
            sketcher.update(["a"] * 4)
    else:
        sketcher = sketched(model, factors[other])
    with pytest.raises(MeritFastError, match="model_fingerprint"):
        state.merge(sketcher.state["a"])


def test_damping_may_change_without_a_pass():
    model = small()
    again = sketched(model, collected(model).with_damping(0.5))
    assert again.identity == sketched(model, collected(model, damping=0.5)).identity


def test_large_damping_is_the_plain_gradient_of_each_parameter():
    """(F + lambda I)^-1 tends to I / lambda."""
    model = small()
    factors = collected(model, damping=1e12)
    result = sketched(model, factors, parameters=r"^1\.weight$").state["a"].block_sums
    with merit_fast.sketch_gradients(model, proj_dim=4096, parameters=r"^1\.weight$") as sketcher:
        losses(model, 3).sum().backward()
        sketcher.update(["a"] * 4)
    plain = sketcher.state["a"].block_sums
    assert_close(result / result.norm(), plain / plain.norm())


def test_what_is_done_to_each_parameter_is_listed():
    model = small()
    assert sketched(model, collected(model, max_side=5)).preconditioned == {
        "0.weight": "diagonal rows, diagonal columns",
        "1.weight": "rows, diagonal columns",
        "1.bias": "entries",
        "2.weight": "entries",
        "2.bias": "entries",
        "3.weight": "rows, columns",
        "3.bias": "entries",
    }


def test_discarded_passes_leave_no_trace():
    model = small()
    with merit_fast.kfac_factors(model) as collector:
        for seed in (0, 7, 1):
            losses(model, seed).sum().backward()
            if seed == 7:
                collector.discard()
            else:
                collector.update()
    kept = collector.factors()
    expected = collected(model)
    assert kept.examples == 8
    assert all(torch.equal(kept.rows[name], expected.rows[name]) for name in expected.rows)


def test_a_gradient_that_is_not_finite_is_refused_and_leaves_no_trace():
    model = small()
    with merit_fast.kfac_factors(model, check="never") as collector:
        losses(model).sum().backward()
        collector.update()
        (losses(model, 1).sum() * float("nan")).backward()
        with pytest.raises(MeritFastError, match=r"parameter \d\.\w+: must have a finite gradient"):
            collector.update()
    assert collector.factors().examples == 4


class Branches(nn.Module):
    """Has a branch that only some calls take."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Linear(4, 3)
        self.branch = nn.Linear(3, 3)
        self.branched = False

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        return self.branch(hidden) if self.branched else hidden


def test_parameters_without_a_gradient_are_refused_once_they_have_one():
    model = Branches()
    x = torch.randn(2, 4)
    with merit_fast.kfac_factors(model) as collector:
        model(x).square().sum().backward()
        collector.update()
    factors = collector.factors()
    assert set(factors.unseen) == {"branch.weight", "branch.bias"}
    options = dict(proj_dim=4096, normalize="kfac", factors=factors)
    with merit_fast.sketch_gradients(model, **options) as sketcher:
        model(x).square().sum().backward()
        assert sketcher.take().any()
        assert sketcher.preconditioned["branch.bias"] == "no factor: no gradient seen"
        model.branched = True
        with pytest.raises(MeritFastError, match=r"parameter branch\.\w+: must have a gradient in"):
            model(x).square().sum().backward()


@pytest.mark.parametrize("collecting", [True, False])
def test_rows_of_the_wrong_example_are_found(collecting):
    """With as many examples as tokens, a time-first layer's rows look like examples."""
    model = TimeFirst()
    torch.manual_seed(2)
    x = torch.randn(5, 5, 6)
    with merit_fast.kfac_factors(model, check="never") as collector:
        model(x).square().sum().backward()
        collector.update()
    if collecting:
        checked = merit_fast.kfac_factors(model)
    else:
        checked = merit_fast.sketch_gradients(
            model, proj_dim=4096, normalize="kfac", factors=collector.factors()
        )
    with checked, pytest.raises(MeritFastError, match=r"parameter linear\.\w+ of Linear fails the"):
        model(x).square().sum().backward()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, f: sketched(m, None), "factors: must be given with normalize='kfac'"),
        (
            lambda m, f: merit_fast.sketch_gradients(m, factors=f),
            "factors: must be given with normalize='kfac', and only then",
        ),
        (
            lambda m, f: merit_fast.sketch_gradients(m, normalize="shampoo"),
            "normalize: must be None, 'adam' or 'kfac', got 'shampoo'",
        ),
        (lambda m, f: merit_fast.kfac_factors(m, max_side=0), "max_side: must be at least 1"),
        (lambda m, f: f.with_damping(0.0), "damping: must be above 0 and finite, got 0.0"),
        (lambda m, f: f.with_damping(float("nan")), "damping: must be above 0 and finite"),
        (
            lambda m, f: merit_fast.sketch_gradients(
                m, normalize="kfac", factors=f, optimizer=torch.optim.Adam(m.parameters())
            ),
            "optimizer: must be given with normalize='adam'",
        ),
        (lambda m, f: KfacFactors.load("absent"), "absent: is not a file of K-FAC factors"),
    ],
)
def test_bad_input_is_one_line(call, message):
    model = small()
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as error:
        call(model, collected(model))
    assert "\n" not in str(error.value)


def test_factors_of_another_model_are_refused():
    factors = collected(small(), parameters="weight")
    with pytest.raises(MeritFastError, match=r"parameter 1\.bias is absent from the factors"):
        sketched(small(), factors)
    wider = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    with pytest.raises(MeritFastError, match=r"1\.weight: must be \[5, 6\] as in the factors"):
        sketched(wider, factors, parameters="weight")


def test_no_example_no_factor():
    with merit_fast.kfac_factors(small()) as collector:
        pass
    with pytest.raises(MeritFastError, match="needs at least one example"):
        collector.factors()
