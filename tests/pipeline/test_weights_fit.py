"""Weights fitted to held-out rows: the minimum of a quadratic, never worse than the start."""

import itertools

import numpy as np
import pytest
import yaml
from support.checks import tree_bytes
from support.runs import run_all, run_values
from support.tuning import make_branches, make_setting, quadratic, read, tune

from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer
from merit_fast.errors import InputError, MeritFastError
from merit_fast.merge import MergeConfig
from merit_fast.options.parser import parse
from merit_fast.tune import fit
from merit_fast.tune.rows import split_held_out
from merit_fast.tune.search import _Losses, starting_weights


def random_quadratic(count, seed):
    numbers = np.random.default_rng(seed)
    root = numbers.normal(size=(count, count))
    return root @ root.T, numbers.normal(size=count)


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_points_stay_in_the_simplex_and_determine_a_quadratic(count):
    start = tuple(np.random.default_rng(count).dirichlet(np.ones(count)))
    points = np.array(fit.weight_points(start))
    assert len(points) == count * (count + 1) // 2
    assert (points >= 0).all() and np.allclose(points.sum(1), 1)
    pairs = [
        points[:, i] * points[:, j]
        for i, j in itertools.combinations_with_replacement(range(count), 2)
    ]
    rank = np.linalg.matrix_rank(np.stack(pairs, 1))
    assert rank == count * (count + 1) // 2  # enough for any quadratic of weights that sum to 1


@pytest.mark.parametrize("count,seed", [(2, 0), (3, 1), (4, 2), (4, 3), (8, 4)])
def test_without_a_ridge_it_is_the_minimum_on_the_simplex(count, seed):
    bend, slope = random_quadratic(count, seed)

    def loss(w):
        return 2.0 + slope @ np.array(w) + 0.5 * np.array(w) @ bend @ np.array(w)

    start = (1 / count,) * count
    fitted = fit.fit_weights(
        start, loss(start), [loss(w) for w in fit.weight_points(start)], ridge=0.0
    )
    assert sum(fitted) == pytest.approx(1, abs=1e-12) and min(fitted) >= 0
    assert all(round(w, fit.DIGITS) == w for w in fitted)
    others = np.random.default_rng(seed).dirichlet(np.ones(count) * 0.5, 4000)
    assert loss(fitted) <= min(loss(w) for w in [*others, *np.eye(count)]) + 1e-6


def test_a_ridge_pulls_towards_the_start():
    bend, slope = random_quadratic(3, 5)
    start = (0.2, 0.3, 0.5)
    losses = [
        slope @ np.array(w) + 0.5 * np.array(w) @ bend @ np.array(w)
        for w in (start, *fit.weight_points(start))
    ]
    distances = []
    for ridge in (0.0, 0.1, 1.0, 10.0, 1e6):
        distances.append(
            np.abs(np.array(fit.fit_weights(start, losses[0], losses[1:], ridge)) - start).sum()
        )
    assert (
        distances == sorted(distances, reverse=True) and distances[0] > 0.1 and distances[-1] < 1e-3
    )


def test_nothing_to_fit_is_said():
    assert fit.fit_weights((1.0,), 1.0, [1.0], 0.1) is None
    start = (0.5, 0.5)
    assert fit.fit_weights(start, 1.0, [1.0] * 3, 0.1) is None  # flat
    assert fit.fit_weights(start, 1.0, [0.9, 0.9, 1.0], 0.1) is None  # a hill
    assert fit.fit_weights(start, 1.0, [float("nan"), 1.0, 1.0], 0.1) is None


@pytest.fixture
def setting(tmp_path, tiny_model, tiny_mixture):
    return make_setting(tmp_path, tiny_model, tiny_mixture)


def test_the_start_is_by_tokens_or_as_given(tmp_path, tiny_model):
    paths = make_branches(tmp_path, tiny_model)
    config = MergeConfig(weights="fit", scale="auto")
    assert starting_weights(paths, config) == (0.25, 0.5, 0.25)
    assert starting_weights(paths, config, (1.0, 1.0, 2.0)) == (0.25, 0.25, 0.5)
    with pytest.raises(InputError, match="at least 0"):
        starting_weights(paths, config, (-1.0, 1.0, 2.0))


def test_a_known_minimum_is_found_and_the_fit_is_never_worse_than_the_start(setting, monkeypatch):
    minimum = (0.5, 0.2, 0.3)
    bend = [[2.0, 0.3, 0.0], [0.3, 1.0, 0.0], [0.0, 0.0, 3.0]]
    loss = quadratic(minimum, bend)
    monkeypatch.setattr(
        _Losses, "_measure", lambda self, point: loss(point["weights"], point["scale"])
    )
    tuned, sentence = tune(setting, weights="fit", ridge=0.0)
    assert tuned.weights == pytest.approx(minimum, abs=2e-4) and tuned.scale is None
    assert tuned.weight_search.accepted and tuned.weight_search.start == (0.25, 0.5, 0.25)
    assert "(fitted): loss 1.0000 against" in sentence

    def misleading(self, point):  # as the quadratic says, but where the fit ends
        far = np.abs(np.array(point["weights"]) - minimum).max() < 1e-3
        return 9.0 if far else loss(point["weights"], point["scale"])

    monkeypatch.setattr(_Losses, "_measure", misleading)
    tuned, sentence = tune(setting, weights="fit", ridge=0.0)
    assert tuned.weights == (0.25, 0.5, 0.25) and not tuned.weight_search.accepted
    assert tuned.weight_search.fitted_loss == 9.0 and "kept, no better ones" in sentence


def test_a_real_model_is_never_worse_than_at_the_token_weights(setting):
    tuned, _ = tune(setting, weights="fit")
    by = tuned.weight_search
    assert len(by.points) == len(by.losses) == 6
    taken = by.fitted_loss if by.accepted else by.start_loss
    assert taken <= by.start_loss and sum(tuned.weights) == pytest.approx(1)
    assert by.accepted == (tuned.weights != by.start)


def test_a_start_without_a_finite_loss_is_refused(setting, monkeypatch):
    monkeypatch.setattr(_Losses, "_measure", lambda self, point: None)
    with pytest.raises(MeritFastError, match="the loss at the token weights is not finite"):
        tune(setting, weights="fit")


def test_losses_that_are_known_are_not_measured_again(setting, tmp_path, monkeypatch):
    measured = []
    loss = quadratic((0.5, 0.2, 0.3), np.eye(3).tolist(), at=1.3)

    def count(self, point):
        measured.append(point)
        if len(measured) == 6:
            raise KeyboardInterrupt
        return loss(point["weights"], point["scale"])

    monkeypatch.setattr(_Losses, "_measure", count)
    options = {"weights": "fit", "scale": "auto"}
    with pytest.raises(KeyboardInterrupt):
        tune(setting, tmp_path, **options)
    again, _ = tune(setting, tmp_path, **options)
    # Scale 1 at the fitted weights is known, too.
    assert len(measured) == 6 + (1 + 6 + 1 + 4) - 5 - 1
    assert [file.name for file in tmp_path.glob("*.json")] == ["tune.json"]
    assert tune(setting, None, **options)[0] == again == tune(setting, tmp_path, **options)[0]


@pytest.mark.parametrize(
    "values,message",
    [
        (
            {"weights": "fit", "method": "ties", "density": 0.5},
            "weights: must be other than fit with method ties",
        ),
        ({"weights": "fit", "models": [{"weight": 1}]}, "where models have weights of their own"),
        ({"weights": "fitted"}, "tokens, samples, uniform, fit"),
        ({"ridge": -1}, "ridge: must be a number of at least 0"),
        ({"tune_rows": 0}, "tune_rows: must be at least 1"),
        (
            {"scale": "auto", "method": "slerp"},
            "scale: must be absent: method slerp takes no scale",
        ),
        (
            {"scale": "auto", "method": "passthrough"},
            "scale: must be a number with method passthrough",
        ),
        ({"scale": "best"}, "scale: must be a number"),
    ],
)
def test_options_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        parse(MergeConfig, values, "run.yml", "merge")


def test_no_row_chooses_and_reports(tiny_model, tiny_mixture):
    configs = [DatasetConfig(**entry) for entry in tiny_mixture]
    rows = load_mixture(configs, load_tokenizer(str(tiny_model)), DataConfig(), part="train")
    chooses, reports = split_held_out(rows)
    for whole, first, second in zip(rows, chooses, reports, strict=True):
        assert first.num_examples == whole.num_examples // 2
        parts = sorted([*first.places, *second.places])
        assert parts == sorted(whole.places)
        assert len(set(parts)) == whole.num_examples
    (alone,), _ = split_held_out(rows[:1])
    assert alone.num_examples == chooses[0].num_examples  # depends only on the dataset's name


def test_a_run_fits_shows_and_reports_on_other_rows(
    tmp_path, tiny_model, tiny_mixture, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    values = run_values(tiny_model, tiny_mixture)
    values["train"] |= {"controls": {"random": 1, "iid": 0}, "epochs": 1}
    values["merge"] = {"weights": "fit", "scale": "auto"}
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(values))
    summary, _ = run_all(file)
    out = tmp_path / "out"
    for arm in ("merit", "random"):
        tuned = read(out / "merged" / arm / "tune.json")
        assert tuned == summary["tuned"][arm] and tuned["num_examples"] == 4
        assert (
            read(out / "evaluate" / "evaluate.json")["merging_gain"][arm]["weights"]
            == tuned["weights"]
        )
    rows = {d: r["num_examples"] for d, r in summary["arms"]["merit"]["datasets"].items()}
    assert set(rows.values()) == {1}  # of two held out
    page = (out / "report" / "report.html").read_text()
    assert "Chosen on held-out rows" in page
    from merit_fast.report import print_summary

    print_summary(out)
    before = tree_bytes(out)
    again, fresh = run_all(file)
    assert again == summary and "merged/merit" in fresh and tree_bytes(out) == before
    _, fresh = run_all(file, "merge.tune_rows=3")
    assert {"branches/merit-0", "merged/merit"} & fresh == {"branches/merit-0"}
