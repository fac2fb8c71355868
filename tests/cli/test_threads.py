"""Work on files in threads: order, errors, and one job after the other."""

import threading
import time

import pytest

from merit_fast.threads import Job, map_in_threads


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_results_have_the_order_of_the_items(count):
    def square(number):
        time.sleep(0.001 * (count - number))  # later items end first
        return number * number

    assert map_in_threads(square, range(count), 4) == [n * n for n in range(count)]


def test_so_many_threads_work_at_a_time():
    meeting = threading.Barrier(3, timeout=20)
    assert len(map_in_threads(lambda _: meeting.wait(), range(3), 3)) == 3


def test_the_error_of_the_first_item_is_raised_when_all_have_ended():
    ended = []

    def work(number):
        ended.append(number)
        if number in (2, 5):
            raise OSError(f"item {number}")

    with pytest.raises(OSError, match="item 2"):
        map_in_threads(work, range(8), 3)
    assert sorted(ended) == list(range(8))


def test_jobs_run_one_after_the_other_and_pass_their_errors_on():
    order = []

    def slow():
        time.sleep(0.05)
        order.append("slow")
        raise ValueError("first")

    first = Job(slow)
    second = Job(lambda: order.append("second"), after=first)
    second.result()
    assert order == ["slow", "second"]
    with pytest.raises(ValueError, match="first"):
        first.result()
