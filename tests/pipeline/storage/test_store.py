"""Outputs in a store: whole or absent for every reader, one of two attempts, and never a guess."""

import errno
import json
from datetime import timedelta

import pytest
from support.checks import tree_bytes
from support.storage.faulty import with_faults

from merit_fast.errors import InputError, MeritFastError
from merit_fast.pipeline.kept import attempts
from merit_fast.pipeline.kept.attempts import dead_attempts, remove_attempts
from merit_fast.pipeline.storage.place import list_objects, open_place
from merit_fast.pipeline.storage.store import FINISHED, OutputStore

NAME = "branches/merit-0"


def opened(place):
    """A store as another process sees it."""
    store = OutputStore(place)
    store.look()
    return store


def fetched(store, fingerprint, folder, near=None, whole=True):
    folder.mkdir()
    store.fetch(NAME, fingerprint, folder, near or folder / "none", whole)
    return folder


def test_an_output_comes_back_with_all_its_bytes(place, make_output, tmp_path):
    path, fingerprint = make_output(NAME)
    sent = OutputStore(place)
    assert not opened(place).has(NAME, fingerprint)
    assert sent.push(path, NAME)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert sent.uploaded == size - (path / "stage.json").stat().st_size
    store = opened(place)
    assert store.has(NAME, fingerprint)
    copy = fetched(store, fingerprint, tmp_path / "copy")
    expected = tree_bytes(path)
    assert store.stage_text(NAME, fingerprint) == (path / "stage.json").read_text()
    assert tree_bytes(copy) == {k: v for k, v in expected.items() if str(k) != "stage.json"}
    assert store.downloaded == sent.uploaded


def test_the_marker_comes_last(server, make_output):
    place = open_place("s3://marker-last/run")
    place.store.mkdir("marker-last")
    path, fingerprint = make_output(NAME)
    server.requests.clear()
    OutputStore(place).push(path, NAME)
    sent = [request.key for request in server.of("PUT", "")]
    assert sent[-1] == f"marker-last/run/{FINISHED}/{NAME}/{fingerprint}.json"
    assert sent[-2].endswith("/stage.json") and len(sent) == 4


def test_what_is_here_and_agrees_is_not_fetched_again(place, make_output, tmp_path):
    path, fingerprint = make_output(NAME)
    OutputStore(place).push(path, NAME)
    store = opened(place)
    fetched(store, fingerprint, tmp_path / "linked", near=path)
    assert store.downloaded == 0
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "timing.json").write_text('{"train_s": 9.0}')  # the same size
    store.fetch(NAME, fingerprint, damaged, path)
    assert store.downloaded == 0 and json.loads((damaged / "timing.json").read_text()) == {
        "train_s": 1.0
    }


def test_only_branches_are_known_by_their_content(place, make_output):
    """The measures of a model hold its name in the names of their files."""
    path, fingerprint = make_output(NAME)
    OutputStore(place).push(path, NAME)
    OutputStore(place).push(path, "units/evaluate/merit-0")
    store = opened(place)
    assert store.has("branches/merit-1", fingerprint)
    assert store.folder("branches/merit-1", fingerprint) == store.folder(NAME, fingerprint)
    assert store.has("units/evaluate/merit-0", fingerprint)
    assert not store.has("units/evaluate/merit-1", fingerprint)
    with pytest.raises(MeritFastError, match=r"has no finished units/evaluate/merit-1 of this"):
        store.stage_text("units/evaluate/merit-1", fingerprint)


def test_json_files_come_without_the_weights(place, make_output, tmp_path):
    path, fingerprint = make_output(NAME)
    OutputStore(place).push(path, NAME)
    copy = fetched(opened(place), fingerprint, tmp_path / "copy", whole=False)
    assert [file.name for file in copy.rglob("*")] == ["timing.json"]


def test_of_two_attempts_the_first_is_the_output_and_the_second_leaves_nothing(
    place, make_output, tmp_path
):
    first, fingerprint = make_output(NAME, seconds=1.0)
    second, _ = make_output(NAME, seconds=2.0)
    slow = OutputStore(place)
    assert OutputStore(place).push(first, NAME)
    before = list_objects(place)
    assert not slow.push(second, NAME)
    assert list_objects(place) == before
    copy = fetched(opened(place), fingerprint, tmp_path / "copy")
    assert (copy / "timing.json").read_bytes() == (first / "timing.json").read_bytes()


def test_equal_attempts_are_one(place, make_output):
    first, _ = make_output(NAME)
    second, _ = make_output(NAME)
    assert OutputStore(place).push(first, NAME)
    before = list_objects(place)
    again = OutputStore(place)
    assert again.push(second, NAME)
    assert list_objects(place) == before and again.uploaded == 0


@pytest.mark.parametrize(
    "damage,found",
    [
        (lambda data: data[:-1] + b"?", "has the same size and other content"),
        (lambda data: data[:-1], "10,239 bytes instead of 10,240"),
        (None, "is absent, and its output counts as finished"),
    ],
)
def test_a_file_that_is_not_as_it_was_sent_is_an_error(place, make_output, tmp_path, damage, found):
    path, fingerprint = make_output(NAME)
    OutputStore(place).push(path, NAME)
    store = opened(place)
    file = store.folder(NAME, fingerprint) / "deep/weights.bin"
    if damage is None:
        place.store.rm_file(file.path)
    else:
        place.store.pipe_file(file.path, damage(place.store.cat_file(file.path)))
    with pytest.raises(MeritFastError) as caught:
        fetched(store, fingerprint, tmp_path / "copy")
    assert str(caught.value) == f"{file}: {found}"
    assert not (tmp_path / "copy" / "deep" / "weights.bin").exists()
    assert not list((tmp_path / "copy").rglob("*.part"))


@pytest.mark.parametrize("elsewhere", ["../../victim", "/victim", "deep/../../victim"])
def test_a_stage_json_writes_nothing_outside_of_its_output(place, make_output, tmp_path, elsewhere):
    path, fingerprint = make_output(NAME)
    OutputStore(place).push(path, NAME)
    marker = place / FINISHED / NAME / f"{fingerprint}.json"
    values = json.loads(place.store.cat_file(marker.path))
    values["files"][elsewhere] = values["files"].pop("timing.json")
    place.store.pipe_file(marker.path, json.dumps(values).encode())
    with pytest.raises(InputError, match=rf"{marker}: files: must lie in the output, got"):
        fetched(opened(place), fingerprint, tmp_path / "copy")


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_fail_or_lose_their_answer_change_no_byte(
    place, make_output, tmp_path, monkeypatch, seed
):
    monkeypatch.setattr("merit_fast.pipeline.storage.place.PAUSES_S", (0.0,) * 12)
    path, fingerprint = make_output(NAME)
    expected = tree_bytes(path)
    faulty = with_faults(place, failing=0.4, delay_s=0.004, seed=seed)
    assert OutputStore(place).push(path, NAME)  # also where the marker's answer is lost
    copy = fetched(opened(place), fingerprint, tmp_path / "copy")
    assert faulty.failed > 0
    assert tree_bytes(copy) == {k: v for k, v in expected.items() if str(k) != "stage.json"}


def test_a_store_that_stays_down_ends_in_one_line_and_leaves_no_output(place, make_output):
    path, fingerprint = make_output(NAME)
    good = place.store
    faulty = with_faults(place, failing=0.0)

    def goes_down(method, sent):
        faulty.failing = 1.0 if sent.endswith("timing.json") else faulty.failing

    faulty.after = goes_down
    with pytest.raises(MeritFastError) as caught:
        OutputStore(place).push(path, NAME)
    assert not isinstance(caught.value, InputError)  # exit code 1: the driver starts it again
    assert str(caught.value).startswith(f"{place}/outputs/{NAME}/attempt-")
    assert str(caught.value).endswith("(4 tries)") and "\n" not in str(caught.value)
    place.store = good
    assert not opened(place).has(NAME, fingerprint)
    assert OutputStore(place).push(path, NAME) and opened(place).has(NAME, fingerprint)


def test_a_full_disk_is_named_at_once(place, make_output, tmp_path):
    path, fingerprint = make_output(NAME)
    OutputStore(place).push(path, NAME)
    calls = []

    def fill(source, target):
        calls.append(source)
        raise OSError(errno.ENOSPC, "No space left on device")

    store = opened(place)
    with_faults(place, failing=0.0).get_file = fill
    with pytest.raises(MeritFastError) as caught:
        fetched(store, fingerprint, tmp_path / "copy", whole=False)
    file = tmp_path / "copy" / "timing.json"
    said = f"{file}: no space is left on its disk; the same command resumes the work"
    assert str(caught.value) == said and len(calls) == 1


def test_a_store_that_refuses_is_bad_input_at_once(place, make_output):
    path, _ = make_output(NAME)
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise PermissionError("Access Denied")

    faulty = with_faults(place, failing=0.0)
    faulty.put_file = refuse
    with pytest.raises(InputError, match=r"may not be accessed: Access Denied$"):
        OutputStore(place).push(path, NAME)
    assert len(calls) <= 2  # two files in two threads, each once


def test_a_bucket_that_is_not_there_is_bad_input(server):
    store = OutputStore(open_place("s3://no-such-bucket-here/run"))
    with pytest.raises(InputError, match=r"^s3://no-such-bucket-here/run/finished: does not exist"):
        store.look()


def test_clean_removes_attempts_that_died_long_ago_by_the_clock_of_the_store(
    place, make_output, monkeypatch
):
    monkeypatch.setattr("time.time", lambda: 0.0)  # this machine's clock is wrong
    path, fingerprint = make_output(NAME)
    assert OutputStore(place).push(path, NAME)
    finished = list_objects(place)
    dead = place / "outputs/branches/merit-1/attempt-0123456789abcdef"
    place.store.pipe_file((dead / "deep/weights.bin").path, b"half")
    assert dead_attempts(OutputStore(place)) == []  # another process may still send it
    monkeypatch.setattr(attempts, "LEAST_AGE", timedelta(0))
    rows = dead_attempts(OutputStore(place))
    assert [(row.name, row.num_bytes) for row in rows] == [(dead.url[len(place.url) + 1 :], 4)]
    assert remove_attempts(OutputStore(place), rows) == rows
    assert list_objects(place) == finished and opened(place).has(NAME, fingerprint)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:planted-word@bucket/run",
        "https://host/run?token=planted-word",
        "simplecache::https://user:planted-word@host/run",
    ],
)
def test_a_url_with_credentials_is_refused_without_showing_it(url):
    with pytest.raises(InputError) as caught:
        open_place(url)
    assert "planted-word" not in str(caught.value) and "--storage: must be" in str(caught.value)


def test_errors_of_a_client_show_no_secret(place, make_output, monkeypatch):
    monkeypatch.setenv("STORE_ACCESS_KEY", "planted-word")
    faulty = with_faults(place, failing=0.0)

    def fail(*args, **kwargs):
        raise OSError("signed with planted-word")

    faulty.put_file = fail
    with pytest.raises(MeritFastError) as caught:
        OutputStore(place).push(make_output(NAME)[0], NAME)
    assert str(caught.value).endswith("signed with $STORE_ACCESS_KEY (4 tries)")
