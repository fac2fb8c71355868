"""A token store: made once, the same bytes by any number of workers, made again when damaged."""

import re
from dataclasses import replace

import numpy as np
import pytest
from support.data.rows import write
from support.data.stores import LONG, content, files_of, load, store_at

import merit_fast.data.load as loading
from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.data.store.build import token_dtype
from merit_fast.errors import InputError
from merit_fast.progress import SilentProgress

BAD = {"prompt": "a", "completion": 3}


class Notes(SilentProgress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_a_store_holds_the_examples_of_memory_and_reads_no_row_again(
    tmp_path, tokenizer, mixture, monkeypatch
):
    expected = content(load(mixture, tokenizer))
    assert expected[1][1][0] == "1 row longer than 60 tokens was truncated"
    assert content(load(mixture, tokenizer, store=store_at(tmp_path / "s"))) == expected
    monkeypatch.setattr(loading, "read_rows", lambda *a: pytest.fail("a row was read again"))
    assert content(load(mixture, tokenizer, store=store_at(tmp_path / "s"))) == expected


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, tokenizer, mixture):
    for workers in (0, 1, 2):
        store = store_at(tmp_path / str(workers))
        load(mixture, tokenizer, store=store, num_workers=workers)
    expected = files_of(tmp_path / "0")
    assert len(expected) == 8
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2") == expected
    in_memory = load(mixture, tokenizer, num_workers=2)
    assert content(in_memory) == content(load(mixture, tokenizer))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_refused_or_counted(tmp_path, tokenizer, workers):
    rows = [{"prompt": "x", "completion": str(i)} for i in range(5)]
    rows[1:1] = [LONG]  # found by the encoder
    rows.append(BAD)  # found by the reader
    mixture = [DatasetConfig("a", write(tmp_path / "a.jsonl", rows))]
    store = store_at(tmp_path / "s")

    def load_rows(bad_rows):
        data = DataConfig(max_length=60, too_long="error", bad_rows=bad_rows)
        return load(mixture, tokenizer, data, store=store, num_workers=workers)

    with pytest.raises(InputError, match=r"a.jsonl:7: .*completion"):
        load_rows(0)
    with pytest.raises(InputError, match=r"a: must have at most data.bad_rows = 1 wrong"):
        load_rows(1)
    assert not (tmp_path / "s").exists()
    (dataset,) = load_rows(2)
    assert dataset.num_examples == 5 and dataset.num_rows == 6
    assert dataset.examples.rows.tolist() == [0, 2, 3, 4, 5]
    assert "a.jsonl:7" in dataset.notes[-2] and "a.jsonl:2" in dataset.notes[-1]


@pytest.mark.parametrize("weight", [0.5, 1.7, 3])
def test_a_weight_repeats_examples_without_storing_them_twice(tmp_path, tokenizer, mixture, weight):
    (plain,) = load(mixture[:1], tokenizer, store=store_at(tmp_path / "plain"))
    weighted = [replace(mixture[0], weight=weight)]
    (found,) = load(weighted, tokenizer, store=store_at(tmp_path / "weighted"))
    assert found.num_examples == round(300 * weight)
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "weighted")
    counts = np.bincount(found.examples.rows, minlength=300)
    assert set(counts) <= {int(weight), int(weight) + 1}
    assert (np.diff(found.examples.rows) >= 0).all()
    expected = content([plain])[0][2]
    assert content([found])[0][2] == [expected[row] for row in found.examples.rows]
    assert found.num_tokens == sum(len(e.input_ids) for e in found.examples)


def test_a_damaged_folder_is_made_again_with_a_note(tmp_path, tokenizer, mixture):
    store = store_at(tmp_path / "s")
    expected = content(load(mixture, tokenizer, store=store))
    whole = files_of(tmp_path / "s")
    (tokens,) = (tmp_path / "s" / "f1").glob("*/tokens.bin")
    for verify, data in (
        (False, whole["f1/tokens.bin"][:-2]),
        (True, bytes(len(tokens.read_bytes()))),
    ):
        tokens.write_bytes(data)
        notes = Notes()
        again = load(
            mixture, tokenizer, store=store_at(tmp_path / "s", verify=verify), progress=notes
        )
        assert content(again) == expected and files_of(tmp_path / "s") == whole
        assert len(notes.notes) == 1 and str(tokens) in notes.notes[0]
        assert notes.notes[0].endswith("its rows are tokenized again")


@pytest.mark.parametrize("name", ["meta.json", "index.bin", "tokens.bin"])
def test_a_changed_byte_is_found_in_any_file(tmp_path, tokenizer, mixture, name):
    expected = content(load(mixture, tokenizer, store=store_at(tmp_path / "s")))
    (file,) = (tmp_path / "s" / "f1").glob(f"*/{name}")
    whole = file.read_bytes()
    for place in range(0, len(whole), max(len(whole) // 10, 1)):
        changed = bytearray(whole)
        changed[place] ^= 1 + place % 2
        file.write_bytes(changed)
        found = load(mixture, tokenizer, store=store_at(tmp_path / "s"))
        if name == "tokens.bin":
            rule = r"example \d+: must have the checksum of its index, has another one; remove"
            with pytest.raises(InputError, match=f"{re.escape(str(file.parent))}: {rule}"):
                content(found)
        else:
            assert content(found) == expected and file.read_bytes() == whole


def test_tokens_take_the_narrowest_dtype():
    assert token_dtype([]) == token_dtype([5, 2**16 - 1]) == "<u2"
    assert token_dtype([2**16]) == "<u4"
