"""``split.memory`` in the sketch stage: the same files, by whole models or layer by layer."""

import pytest
import torch
from support.sketch.staged import sketch

from merit_fast.errors import InputError
from merit_fast.model.layered import choose
from merit_fast.model.layered.choose import model_bytes
from merit_fast.model.memory import available_memory_bytes
from merit_fast.sketch.config import SketchConfig

SMALL = dict(examples=8, store=True, store_dim=4096, parts={"mlp": "mlp"})


def files_of(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("normalize", [None, "kfac"])
def test_layers_give_the_bytes_of_the_whole_model(tiny_model, tmp_path, normalize):
    notes = {}
    for memory in ("whole", "layers"):
        options = dict(SMALL, memory=memory, normalize=normalize)
        _, notes[memory] = sketch(tiny_model, tmp_path / memory, **options)
    assert files_of(tmp_path / "layers") == files_of(tmp_path / "whole")
    assert notes["layers"] == notes["whole"]


def test_auto_takes_the_layers_of_a_model_that_does_not_fit_and_says_so(
    tiny_model, tmp_path, monkeypatch
):
    _, notes = sketch(tiny_model, tmp_path / "whole", **SMALL)
    assert not any("one at a time" in note for note in notes)
    size = model_bytes(str(tiny_model), "fp32")
    monkeypatch.setattr(choose, "_available_bytes", lambda: size)
    loaded = []
    real = choose.load_layered
    monkeypatch.setattr(choose, "load_layered", lambda *given: loaded.append(given) or real(*given))
    _, notes = sketch(tiny_model, tmp_path / "layers", **SMALL)
    assert len(loaded) == 1
    assert any(note.startswith("sketch: the model takes") for note in notes)
    assert files_of(tmp_path / "layers") == files_of(tmp_path / "whole")


def test_the_size_of_a_model_is_that_of_its_parameters_in_the_dtype(tiny_model, tmp_path):
    from merit_fast.model import load_model

    model = load_model(str(tiny_model), "fp32")
    entries = sum(parameter.numel() for parameter in model.parameters())
    assert model_bytes(str(tiny_model), "fp32") == 4 * entries
    assert model_bytes(str(tiny_model), "bf16") == 2 * entries
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    assert model_bytes(str(tmp_path), "fp32") is None


def test_available_memory_is_that_of_the_control_group_if_it_has_less(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:  800 kB\n")
    assert available_memory_bytes(tmp_path) == 800 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("300000\n")
    (group / "memory.stat").write_text("anon 100\ninactive_file 1000\n")
    for limit, expected in (("max", 800 * 1024), ("500000", 201000), ("9000000", 800 * 1024)):
        (group / "memory.max").write_text(limit)
        assert available_memory_bytes(tmp_path) == expected


def test_moments_of_adam_are_refused_with_layers():
    with pytest.raises(InputError, match="memory: must be auto or whole with normalize adam"):
        SketchConfig(normalize="adam", optimizer="run", memory="layers")
