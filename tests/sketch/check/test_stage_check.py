"""The sketch stage checks itself: no sum changes by it, and its result stands with the sums."""

import json

import pytest
import torch
from support.checks import assert_close
from support.sketch.staged import sketch

from merit_fast.errors import InputError, MeritFastError
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.mixture import stage as sketching
from merit_fast.sketch.mixture.reuse import read_check


def test_the_check_changes_no_bit_and_stands_with_the_sums(tiny_model, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "never").mkdir()
    checked, _ = sketch(tiny_model, tmp_path / "first", examples=20)
    plain, _ = sketch(tiny_model, tmp_path / "never", examples=20, check="never")
    for name, state in plain.items():
        assert state.to_bytes() == checked[name].to_bytes()
    assert read_check(tmp_path / "never") is None
    result = read_check(tmp_path / "first")
    assert result.row_error == result.sum_error == 1e-6
    assert str(result) == "checked against autograd: 1e-6"
    records = json.loads((tmp_path / "first" / "datasets.json").read_text())
    assert records["mixed"]["check"]["sum_error_below"] == 1e-6


def odd_model(monkeypatch):
    """Lets the stage load a model whose first down projection has a weight in two parts."""
    real = sketching.load_model_for

    def load(*arguments):
        model = real(*arguments)
        layer = next(m for name, m in model.named_modules() if name.endswith("0.mlp.down_proj"))
        torch.nn.utils.parametrizations.weight_norm(layer)
        return model

    monkeypatch.setattr(sketching, "load_model_for", load)


def test_parameters_that_no_hook_covers_are_exact_and_told_once(tiny_model, tmp_path, monkeypatch):
    for name in ("together", "alone"):
        (tmp_path / name).mkdir()
    odd_model(monkeypatch)
    options = dict(parameters="mlp|norm", examples=6)
    states, notes = sketch(tiny_model, tmp_path / "together", **options)
    alone, _ = sketch(tiny_model, tmp_path / "alone", batch_size=1, **options)
    for name, state in alone.items():
        assert_close(state.block_sums, states[name].block_sums)
    (note,) = [note for note in notes if "backward pass per example" in note]
    assert "2 of " in note and "down_proj.parametrizations.weight.original" in note
    assert len(read_check(tmp_path / "together").slow_parameters) == 2


def test_a_row_without_a_finite_gradient_is_named_and_its_dataset_not_written(
    tiny_model, tmp_path, monkeypatch
):
    real = sketching.load_model_for

    def load(*arguments):
        model = real(*arguments)
        model.get_input_embeddings().weight.data[11] = torch.nan
        return model

    monkeypatch.setattr(sketching, "load_model_for", load)
    told = r"sketch: clear: row \d+, counted from 0: must have a finite gradient in fp32, found NaN"
    with pytest.raises(MeritFastError, match=told):
        sketch(tiny_model, tmp_path, examples=8)
    assert not list(tmp_path.glob("*.safetensors"))


def test_uncovered_parameters_can_be_an_error(tiny_model, tmp_path, monkeypatch):
    odd_model(monkeypatch)
    with pytest.raises(Exception, match=r"parameters='\^\(\?!"):
        sketch(tiny_model, tmp_path, examples=4, uncovered="error")


@pytest.mark.parametrize("key", ["check", "uncovered"])
def test_the_options_are_in_the_config(key):
    from merit_fast.options.parser import parse

    with pytest.raises(InputError, match=key):
        parse(SketchConfig, {key: "perhaps"}, "split")
