"""A token store and the processes that make it: killed, interrupted, several at once."""

import itertools
import os
import signal
import subprocess
import sys
import threading

import pytest
from support.data.rows import make_tokenizer, write
from support.data.stores import content, files_of, load, store_at

import merit_fast.data.load as loading
from merit_fast.data import DataConfig
from merit_fast.data.encode import RowEncoder
from merit_fast.data.store.workers import ChunkEncoder
from merit_fast.errors import InputError, MeritFastError


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, mixture):
    code = """
import pathlib, resource, signal, sys
from support.data.rows import make_tokenizer
from merit_fast.data import DataConfig, DatasetConfig, load_mixture
from merit_fast.data.store import TokenStore
from merit_fast.errors import MeritFastError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = TokenStore(pathlib.Path(sys.argv[2]), {"a": "f1"})
try:
    load_mixture(
        [DatasetConfig("a", sys.argv[1])], make_tokenizer(), DataConfig(), part="train", store=store
    )
except MeritFastError as error:
    print(error)
"""
    paths = [mixture[0].path, str(tmp_path / "s")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", code, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    line = done.stdout.strip()
    assert line.startswith(f"{tmp_path}/s/f1/") and "\n" not in line
    assert ": it is larger than its disk or a limit of this process allows;" in line
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
