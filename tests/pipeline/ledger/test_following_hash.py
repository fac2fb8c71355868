"""The hash of a file that is taken while others write it equals the hash of the finished file."""

import os
import random
import threading
import time
from contextlib import closing

import pytest

from merit_fast.kernels.dispatch import native
from merit_fast.manifests.following import FollowingHash
from merit_fast.manifests.hashes import checksum


def pieces_of(size, most, rng):
    """Runs that cover ``size`` bytes once."""
    at = 0
    while at < size:
        count = min(rng.randint(1, most), size - at)
        yield at, count
        at += count


@pytest.mark.parametrize("order", ["rising", "falling", "any"])
@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, 5_000_011])
def test_the_hash_is_that_of_the_finished_file_whatever_the_order(tmp_path, size, order):
    rng = random.Random(size)
    data = rng.randbytes(size)
    runs = list(pieces_of(size, 300_000, rng))
    if order == "falling":
        runs.reverse()
    elif order == "any":
        rng.shuffle(runs)
    written = native().Written()
    file = tmp_path / "file"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    os.truncate(descriptor, size)
    with closing(FollowingHash(descriptor, written.prefix)) as digest:
        for at, count in runs:
            os.pwrite(descriptor, data[at : at + count], at)
            written.add(at, count)
            time.sleep(0.001)
        assert written.prefix() == size
        found = digest.finish(size)
    os.close(descriptor)
    assert found == checksum(file)


def test_bytes_that_may_still_change_are_not_read(tmp_path):
    """A hole stays unread while it is open: what is written into it last counts."""
    size = 3 << 20
    written = native().Written()
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with closing(FollowingHash(descriptor, written.prefix)) as digest:
        os.pwrite(descriptor, b"a" * (2 << 20), 1 << 20)
        written.add(1 << 20, 2 << 20)
        time.sleep(0.05)
        assert written.prefix() == 0
        os.pwrite(descriptor, b"b" * (1 << 20), 0)
        written.add(0, 1 << 20)
        assert written.prefix() == size
        found = digest.finish(size)
    os.close(descriptor)
    assert found == checksum(tmp_path / "file")


def test_prefixes_grow_with_many_writers():
    written = native().Written()
    runs = [(at, 7) for at in range(0, 7 * 20_000, 7)]
    random.Random(0).shuffle(runs)
    seen = []

    def add(part):
        for at, count in runs[part::4]:
            written.add(at, count)
            seen.append(written.prefix())

    threads = [threading.Thread(target=add, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written.prefix() == 7 * 20_000
    assert max(seen) == written.prefix()


def test_a_file_that_is_cut_while_it_is_hashed_is_an_error(tmp_path):
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, b"x" * 10, 0)
    with (
        closing(FollowingHash(descriptor, lambda: 0)) as digest,
        pytest.raises(OSError, match="10 of 11"),
    ):
        digest.finish(11)
    os.close(descriptor)


def test_an_error_of_the_writer_ends_the_thread(tmp_path):
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    before = threading.active_count()
    with pytest.raises(KeyError), closing(FollowingHash(descriptor, lambda: 0)):
        raise KeyError("of the writer")
    os.close(descriptor)
    assert threading.active_count() == before
