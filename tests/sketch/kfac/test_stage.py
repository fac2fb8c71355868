"""``split.normalize`` in the sketch stage: the same sums as in one's own code, kept and refused."""

import pytest
import torch
from support.checks import assert_close
from support.runs import Notes
from support.sketch.staged import datasets, sketch

import merit_fast
from merit_fast.data import collate
from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.model import load_model, target_losses
from merit_fast.model.layered.choose import load_model_for
from merit_fast.options.parser import parse
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.gradients import GradientSketcher
from merit_fast.sketch.mixture.stage import sketch_mixture
from merit_fast.sketch.precondition import KfacFactors, adam_scales

SMALL = dict(examples=16, batch_size=8)


def passes(model, rows=16):
    """Backward passes of the mean losses of each dataset's first rows, as the stage takes them."""
    for dataset in datasets():
        for start in range(0, rows, 8):
            examples = dataset.examples[start : start + 8]
            losses = target_losses(model, collate(examples, [0] * 8, 1))
            sums = torch.zeros(8).index_add(0, losses.example, losses.loss)
            counts = torch.zeros(8).index_add(0, losses.example, torch.ones_like(losses.loss))
            (sums / counts).sum().backward()
            yield dataset.name, counts.long()


@pytest.fixture(scope="module")
def first_rows():
    """Lets the stage choose the first rows."""
    patch = pytest.MonkeyPatch()
    patch.setattr(
        "merit_fast.sketch.mixture.drawing.choose_examples", lambda d, c: list(range(c.examples))
    )
    yield
    patch.undo()


@pytest.fixture(scope="module")
def kfac_run(tiny_model, tmp_path_factory, first_rows):
    folder = tmp_path_factory.mktemp("kfac")
    states, notes = sketch(tiny_model, folder, normalize="kfac", **SMALL)
    return folder, states, notes


def test_kfac_is_that_of_the_rows_that_are_sketched(tiny_model, kfac_run):
    folder, states, notes = kfac_run
    model = load_model(str(tiny_model), "fp32")
    with merit_fast.kfac_factors(model, check="never") as collector:
        for _ in passes(model):
            collector.update()
    factors = collector.factors()
    kept = KfacFactors.load(folder / "factors.kfac")
    assert kept.examples == 32
    for name, rows in factors.rows.items():
        assert_close(kept.rows[name], rows)
    options = dict(check="never", weight="tokens")
    with GradientSketcher(model, CountSketch(4096), factors=factors, **options) as sketcher:
        for name, tokens in passes(model):
            sketcher.update([name] * 8, None, tokens)
    for name, state in states.items():
        assert_close(state.block_sums, sketcher.state[name].block_sums)
        assert state.identity.model_fingerprint.startswith("kfac ")
    assert any("K-FAC factors of 32 examples" in note for note in notes)


def test_a_killed_run_takes_its_factors_over(tiny_model, kfac_run, tmp_path, monkeypatch):
    folder, states, _ = kfac_run
    for name in ("factors.kfac", "factors.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr("merit_fast.sketch.mixture.multipliers._collect", None)
    again, _ = sketch(tiny_model, tmp_path, normalize="kfac", **SMALL)
    for name, state in states.items():
        assert torch.equal(again[name].block_sums, state.block_sums)


@pytest.mark.parametrize("fault", ["changed byte", "other rows"])
def test_other_factors_are_collected_again(tiny_model, kfac_run, tmp_path, fault):
    folder, states, _ = kfac_run
    for name in ("factors.kfac", "factors.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    examples = 16
    if fault == "changed byte":
        data = bytearray((tmp_path / "factors.kfac").read_bytes())
        data[-1] ^= 1
        (tmp_path / "factors.kfac").write_bytes(data)
    else:
        examples = 8
    _, notes = sketch(tiny_model, tmp_path, normalize="kfac", examples=examples, batch_size=8)
    assert any(f"K-FAC factors of {2 * examples} examples" in note for note in notes)


def test_sums_of_another_mixture_are_not_reused(tiny_model, kfac_run, tmp_path):
    """The factors are of all datasets, so every sum changes when one leaves."""
    folder, states, _ = kfac_run
    for keep, expected in ((2, 2), (1, 0)):
        progress = Notes()
        target = tmp_path / str(keep)
        options = dict(proj_dim=4096, dtype="fp32", normalize="kfac", **SMALL)
        config = SketchConfig(**options)
        sketch_mixture(
            str(tiny_model), "fingerprint", datasets()[:keep], 1, config, target, progress, [folder]
        )
        reused = [note for note in progress.notes if "are reused" in note]
        assert len(reused) == (1 if expected else 0)
        assert (target / "factors.kfac").is_file()


def test_another_damping_takes_the_factors_of_an_earlier_run(
    tiny_model, kfac_run, tmp_path, monkeypatch
):
    folder, states, _ = kfac_run
    for name in ("factors.kfac", "factors.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr("merit_fast.sketch.mixture.multipliers._collect", None)
    other, _ = sketch(tiny_model, tmp_path, normalize="kfac", damping=0.5, **SMALL)
    assert not torch.equal(other["clear"].block_sums, states["clear"].block_sums)
    kept = KfacFactors.load(tmp_path / "factors.kfac")
    assert kept.damping == 0.5
    model = load_model(str(tiny_model), "fp32")
    options = dict(fingerprint="fingerprint", weight="tokens")
    with GradientSketcher(model, CountSketch(4096), factors=kept, **options) as sketcher:
        assert sketcher.identity == other["clear"].identity


def test_factors_of_an_earlier_run_leave_with_the_option(tiny_model, kfac_run, tmp_path):
    folder, _, _ = kfac_run
    for name in ("factors.kfac", "factors.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    sketch(tiny_model, tmp_path, **SMALL)
    assert not list(tmp_path.glob("factors.*"))


def test_adam_takes_a_trainers_checkpoint(tiny_model, first_rows, tmp_path):
    model = load_model(str(tiny_model), "fp32")
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in decayed]},
        {"params": [p for n, p in named if n not in decayed]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, eps=1e-3)
    for _ in passes(model):
        optimizer.step()
    (tmp_path / "checkpoint").mkdir()
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint/optimizer.pt")
    options = dict(normalize="adam", optimizer=str(tmp_path / "checkpoint"), **SMALL)
    states, _ = sketch(tiny_model, tmp_path / "out", **options)
    scales = adam_scales(model, optimizer, dict(model.named_parameters()))
    options = dict(check="never", weight="tokens")
    with GradientSketcher(model, CountSketch(4096), scales=scales, **options) as sketcher:
        for name, tokens in passes(model):
            sketcher.update([name] * 8, None, tokens)
    for name, state in states.items():
        assert_close(state.block_sums, sketcher.state[name].block_sums)


def test_an_absent_optimizer_is_refused_before_the_model_is_read(tmp_path):
    with pytest.raises(InputError, match="split.optimizer: must hold optimizer.pt, .* is absent"):
        sketch(
            tmp_path / "no model",
            tmp_path / "out",
            normalize="adam",
            optimizer=str(tmp_path),
            **SMALL,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"normalize": "adam"}, "split: optimizer: must be a folder with normalize adam, and only"),
        ({"optimizer": "x"}, "split: optimizer: must be a folder with normalize adam, and only"),
        ({"normalize": "kfac", "optimizer": "x"}, "split: optimizer: must be a folder with"),
        ({"damping": 0.1}, "split: damping: must be above 0 and finite, with normalize kfac only"),
        ({"normalize": "kfac", "damping": 0.0}, "split: damping: must be above 0 and finite"),
        ({"normalize": "shampoo"}, "split: normalize: must be"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(InputError, match=message):
        parse(SketchConfig, options, "split")


def test_a_gradient_that_is_not_finite_is_named_by_dataset_and_row(
    tiny_model, first_rows, tmp_path, monkeypatch
):
    load = load_model_for

    def broken(*arguments):
        model = load(*arguments)
        with torch.no_grad():
            model.get_input_embeddings().weight[9] = float("inf")
        return model

    monkeypatch.setattr("merit_fast.sketch.mixture.stage.load_model_for", broken)
    with pytest.raises(MeritFastError, match=r"sketch: clear: one of the rows \[0, 1, .*finite"):
        sketch(tiny_model, tmp_path, normalize="kfac", check="never", **SMALL)
    assert not list(tmp_path.glob("*.safetensors"))
