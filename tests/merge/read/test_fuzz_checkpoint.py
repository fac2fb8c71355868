"""Any header, index or config is taken or refused on one line, soon, without stray files.

support.merge.fuzz does the same for as long as one likes, guided by coverage.
"""

import json
import random
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.merge.fuzz import checkpoint as fuzz
from support.merge.fuzz import seeds
from support.merge.headers import INDEX, backends_agree, one_tensor, pack, tensor, write_model

from merit_fast.merge import merge_models

LIMITS = {
    "deadline": timedelta(seconds=10),
    "derandomize": True,
}  # far above what any takes: a hang, not slowness


@st.composite
def damaged(draw, documents):
    """A JSON text with up to 6 structural changes and, at times, a few changed bytes."""
    text = json.dumps(draw(st.sampled_from(documents))).encode()
    rng = random.Random(
        draw(st.binary(min_size=8, max_size=8))
    )  # integers would crowd at small ones
    for _ in range(draw(st.integers(0, 6))):
        text = fuzz.damage(text, rng)
    if draw(st.booleans()):
        content = bytearray(text)
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, len(content)))
            content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
        text = bytes(content)
    return text


def read(kind, content, data_bytes=24):
    with tempfile.TemporaryDirectory() as root:
        fuzz.check(kind, content, data_bytes, Path(root))
        assert {file.name for file in Path(root).iterdir()} == {kind, "out"}


@pytest.mark.parametrize("kind", seeds.SEEDS)
def test_each_value_may_be_anything(tmp_path, kind):
    for content in fuzz.replaced_once(seeds.SEEDS[kind]):
        fuzz.check(kind, content, seeds.DATA_BYTES.get(kind, 24), tmp_path)


@settings(max_examples=400, **LIMITS)
@given(damaged([seeds.HEADER]), st.sampled_from([24, 24, 0, 8, 48]))
def test_any_header_is_read_as_safetensors_reads_it_or_refused(content, data_bytes):
    read("header", content, data_bytes)


@settings(max_examples=400, **LIMITS)
@given(damaged([seeds.HEADER, seeds.PAIR]), st.sampled_from([24, 32, 0, 8]))
def test_the_native_parser_and_the_reference_agree(text, data_bytes):
    backends_agree(text, 8 + len(text) + data_bytes)


@settings(max_examples=200, **LIMITS)
@given(st.binary(max_size=200), st.integers(0, 3))
def test_any_bytes_are_refused(content, keep):
    read("raw", one_tensor()[: 8 * keep] + content)


@settings(max_examples=200, **LIMITS)
@given(damaged([seeds.SEEDS["index"]]))
def test_any_index_is_read_or_refused(content):
    read("index", content)


@settings(max_examples=200, **LIMITS)
@given(damaged([seeds.CONFIG]))
@example(b'{"a":' * 300 + b"1" + b"}" * 300)
@example(b'{"x": Infinity, "name": "\\ud800", "dtype": [], "text_config": 3, "auto_map": null}')
def test_any_config_is_read_or_refused(content):
    read("config", content)


@settings(max_examples=200, **LIMITS)
@given(damaged([seeds.LORA]))
def test_any_adapter_config_is_read_or_refused(content):
    read("lora", content)


@settings(max_examples=200, **LIMITS)
@given(damaged([seeds.PAIR]))
def test_any_adapter_is_read_or_refused(content):
    read("pair", content, 32)


@settings(max_examples=200, **LIMITS)
@given(damaged([seeds.QUANTISED]), st.sampled_from([256, 256, 0, 8]))
def test_any_quantised_header_is_read_or_refused(content, data_bytes):
    read("quantised", content, data_bytes)


@settings(max_examples=200, **LIMITS)
@given(damaged([seeds.SCHEME]))
def test_any_quantisation_of_a_config_is_read_or_refused(content):
    read("scheme", content)


@settings(max_examples=60, **LIMITS)
@given(
    damaged([seeds.HEADER]),
    damaged(
        [
            {"weight_map": {"v": "a.safetensors", "w": "a.safetensors"}},
            {"weight_map": {"v": "../a.safetensors"}},
        ]
    ),
)
def test_a_merge_writes_nothing_beside_its_output(header, index):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        good = write_model(root / "good", {"model.safetensors": pack(seeds.HEADER, bytes(24))})
        bad = write_model(root / "bad", {"a.safetensors": pack(header, bytes(24))}, index)
        (root / "a.safetensors").write_bytes(pack({"v": tensor([1], 0, 4)}, bytes(4)))
        before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
        merged = fuzz.survives(lambda: merge_models([good, bad], [0.5, 0.5], out=root / "out"))
        after = {
            file: file.read_bytes()
            for file in root.rglob("*")
            if file.is_file() and file.parent.name != "out"
        }
        assert (
            after == before
        )  # no unfinished output is left: the fault was seen before a byte was written
        assert (
            merged
            == (root / "out").exists()
            == (root / "out" / INDEX.replace(".index.json", "")).exists()
        )
