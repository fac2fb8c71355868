"""A token store: made once, the same bytes by any number of workers, made again when damaged."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from support.data.rows import make_tokenizer, write

import merit_fast.data.load as loading
from merit_fast.data import DataConfig, DatasetConfig, load_mixture
from merit_fast.data.encode import RowEncoder
from merit_fast.data.store import TokenStore
from merit_fast.data.store.build import token_dtype
from merit_fast.data.store.workers import ChunkEncoder
from merit_fast.errors import InputError, MeritFastError
from merit_fast.progress import SilentProgress

LONG = {"prompt": "a", "completion": "1 2 3 4 5 6 7 8 9 0 " * 30}
BAD = {"prompt": "a", "completion": 3}


class Notes(SilentProgress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def mixture(tmp_path):
    a = [{"prompt": f"{i}?", "completion": f"{i} " * (i % 5 + 1)} for i in range(300)]
    b = [{"prompt": "x", "completion": "y", "more": 1}, LONG]
    return [
        DatasetConfig("a", write(tmp_path / "a.jsonl", a)),
        DatasetConfig("b", write(tmp_path / "b.jsonl", b)),
    ]


def store_at(folder, **keys):
    return TokenStore(folder, {"a": "f1", "b": "f2"}, **keys)


def load(mixture, tokenizer, data=None, **keys):
    data = data or DataConfig(max_length=60, ignore_columns=("more",))
    return load_mixture(mixture, tokenizer, data, part="train", **keys)


def content(datasets):
    return [
        (d.name, d.notes, [(e.input_ids.tolist(), e.labels.tolist()) for e in d.examples])
        for d in datasets
    ]


def files_of(folder):
    """The files below a folder, by fingerprint and name: each has one choice of rows."""
    return {
        f"{path.relative_to(folder).parts[0]}/{path.name}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, mixture):
    code = """
import pathlib, resource, signal, sys
from support.data.rows import make_tokenizer
from merit_fast.data import DataConfig, DatasetConfig, load_mixture
from merit_fast.data.store import TokenStore
from merit_fast.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = TokenStore(pathlib.Path(sys.argv[2]), {"a": "f1"})
try:
    load_mixture(
        [DatasetConfig("a", sys.argv[1])], make_tokenizer(), DataConfig(), part="train", store=store
    )
except InputError as error:
    print(error)
"""
    paths = [mixture[0].path, str(tmp_path / "s")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", code, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    line = done.stdout.strip()
    assert line.startswith(f"{tmp_path}/s/f1/") and "\n" not in line
    assert line.endswith(": cannot be written: File too large")
    assert not (tmp_path / "s").exists()


def test_a_killed_build_leaves_no_store_and_the_next_one_makes_it(tmp_path, tokenizer, mixture):
    code = """
import os, signal, sys
from support.data.rows import make_tokenizer
import merit_fast.data.store.files as files
from merit_fast.data import DataConfig, DatasetConfig, load_mixture
from merit_fast.data.encode import RowEncoder
from merit_fast.data.store import TokenStore
append = files.FileColumns.append
def die(self, chunk):
    append(self, chunk)
    if self.folder.parent.name == "f2":
        os.kill(os.getpid(), signal.SIGKILL)
files.FileColumns.append = die
mixture = [DatasetConfig("a", sys.argv[1]), DatasetConfig("b", sys.argv[2])]
store = TokenStore(__import__("pathlib").Path(sys.argv[3]), {"a": "f1", "b": "f2"})
data = DataConfig(max_length=60, ignore_columns=("more",))
load_mixture(mixture, make_tokenizer(), data, part="train", store=store)
"""
    paths = [mixture[0].path, mixture[1].path, str(tmp_path / "s")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, *paths], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "s" / "f1").glob("*/meta.json"))) == 1
    assert [path.suffix for path in (tmp_path / "s" / "f2").glob("[!.]*")] == [".tmp"]
    load(mixture, tokenizer, store=store_at(tmp_path / "whole"))
    load(mixture, tokenizer, store=store_at(tmp_path / "s"))
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


def test_two_at_once_make_one_store(tmp_path, tokenizer, mixture, monkeypatch):
    read = []
    plain = loading.read_rows
    monkeypatch.setattr(loading, "read_rows", lambda *a: (read.append(a), plain(*a))[1])
    found = []

    def work():
        found.append(content(load(mixture, make_tokenizer(), store=store_at(tmp_path / "s"))))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 2 and found == [content(load(mixture, tokenizer))] * 3


def test_a_worker_that_dies_ends_the_work_with_one_line(tokenizer, mixture):
    row = ("a.jsonl:1", {"prompt": "x", "completion": "y"})
    row_encoder = RowEncoder(mixture[0], DataConfig(), tokenizer)
    with ChunkEncoder(tokenizer, DataConfig(), 1) as encoder:
        chunks = encoder.chunks(mixture[0], row_encoder, itertools.repeat(row, 3000))
        next(chunks)
        encoder._workers._processes[0].kill()
        with pytest.raises(MeritFastError, match="process that tokenizes rows ended with code -9"):
            list(chunks)


def test_ctrl_c_ends_the_workers_without_a_word(tmp_path, tokenizer, mixture):
    code = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it
from support.data.rows import make_tokenizer
import merit_fast.data.store.workers as workers
from merit_fast.data import DataConfig, DatasetConfig, load_mixture
asked = workers._ask
def ask(process, message):
    print("pid", process.pid, flush=True)
    return asked(process, message)
workers._ask = ask
mixture = [DatasetConfig("a", sys.argv[1])]
try:
    load_mixture(mixture, make_tokenizer(), DataConfig(), part="train", num_workers=1)
except KeyboardInterrupt:
    print("interrupted")
"""
    rows = [{"prompt": "a", "completion": "b"}] * 200_000
    path = write(tmp_path / "many.jsonl", rows)
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, path]
    with subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid"))
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (out.splitlines()[-1], err) == ("interrupted", "")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_error_in_a_worker_is_raised_here(mixture):
    tokenizer = make_tokenizer(template="{{ 1 / 0 }}")
    with pytest.raises(InputError, match="a.jsonl:1: the chat template refuses this row"):
        load(mixture, tokenizer, num_workers=1)


def test_tokens_take_the_narrowest_dtype():
    assert token_dtype([]) == token_dtype([5, 2**16 - 1]) == "<u2"
    assert token_dtype([2**16]) == "<u4"
