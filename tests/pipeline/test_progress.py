"""Progress is alive in a log, fits a narrow terminal, and its estimates are of this run's work."""

import io
import threading

import pytest

from merit_fast.progress import PlainProgress, TerminalProgress
from merit_fast.progress_lines import Meter, bar_line, cut_middle, finished_line, log_line


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log(clock):
    return PlainProgress(io.StringIO(), clock)


def lines(log):
    return log.stream.getvalue().splitlines()


def test_a_log_gets_a_line_at_every_tenth_and_one_at_the_end(log, clock):
    with log.task("train joint", 200, "tokens") as task:
        for _ in range(40):
            clock.now += 1
            task.advance(5, "loss 1.234")
    assert len(lines(log)) == 10
    assert lines(log)[0] == ("train joint: 10 %, 5 tokens/s, 4 s elapsed, 36 s left, loss 1.234")
    assert lines(log)[-2].startswith("train joint: 90 %, ")
    assert lines(log)[-1] == "train joint: 200 tokens in 40 s, 5 tokens/s"


def test_a_short_task_gets_one_line(log, clock):
    with log.task("merge merit", 1000, "parameters") as task:
        for _ in range(100):
            clock.now += 0.01
            task.advance(10)
    assert lines(log) == ["merge merit: 1 k parameters in 1 s, 1 k parameters/s"]


def test_one_long_step_does_not_keep_a_log_silent():
    class Waiting(io.StringIO):
        def __init__(self):
            super().__init__()
            self.written = threading.Event()

        def write(self, text):
            result = super().write(text)
            self.written.set()
            return result

    stream = Waiting()
    with PlainProgress(stream, longest_silence_s=0.05).task("evaluate", 10, "tokens"):
        assert stream.written.wait(20)  # the task itself does nothing meanwhile
    assert stream.getvalue().startswith("evaluate: 0 %, ")


def test_a_failed_task_ends_without_a_line_and_without_its_thread(log):
    before = threading.active_count()
    with pytest.raises(OSError, match="disk"), log.task("merge", 10, "parameters"):
        raise OSError("disk")
    assert lines(log) == []
    assert threading.active_count() == before


def test_notes_are_printed_once(log):
    for text in ("10 steps are few", "another", "10 steps are few"):
        log.note(text)
    assert lines(log) == ["10 steps are few", "another"]


def test_the_estimate_counts_the_work_of_this_run_only(log, clock):
    with log.task("train joint", 100, "tokens") as task:
        task.skip(60)
        clock.now += 10
        task.advance(10)
        clock.now += 20
        task.advance(30)
    assert lines(log)[0] == "train joint: 70 %, 1 tokens/s, 10 s elapsed, 30 s left"
    assert lines(log)[-1] == "train joint: 40 tokens in 30 s, 1.33 tokens/s (60 done earlier)"


def meter_at(clock, done, seconds, name="train merit-0.seed1"):
    meter = Meter(name, 100_000, "tokens", clock)
    clock.now += seconds
    meter.advance(done, "loss 1.234")
    return meter


@pytest.mark.parametrize("width", [40, 50, 60, 70, 80, 100, 140])
def test_percent_bar_and_time_fit_any_terminal(clock, width):
    before, bar, after = bar_line(meter_at(clock, 40_000, 30), width)
    if width >= 48:
        assert len(before + bar + after) < width
    assert before.strip() == "train merit-0.seed1" and len(bar) >= 10
    assert " 40 %" in after and "0:45 left" in after
    assert bar.count("━") == int(0.4 * len(bar))


def test_the_rate_goes_before_the_detail(clock):
    meter = meter_at(clock, 40_000, 30)
    shown = {width: "".join(bar_line(meter, width)) for width in range(40, 141)}
    for text in shown.values():
        assert "loss 1.234" in text or "tokens/s" not in text
    assert "tokens/s" not in shown[60] and "loss 1.234" in shown[62]
    assert "1.33 k tokens/s" in shown[120]


def test_a_bar_without_estimate_and_a_finished_one(clock):
    assert "-:-- left" in bar_line(Meter("evaluate", 10, "tokens", clock), 60)[2]
    assert " 100 %  in 1:05:00" in bar_line(meter_at(clock, 100_000, 3900), 60)[2]
    assert set(bar_line(meter_at(clock, 50_000, 5), 60, ascii_only=True)[1]) == {"#", "-"}


def test_slow_things_are_counted_in_seconds_each(clock):
    meter = Meter("evaluate merges", 10, "merges", clock)
    clock.now += 50
    meter.advance(4)
    assert log_line(meter) == "evaluate merges: 40 %, 12 s/merge, 50 s elapsed, 1 min 15 s left"
    assert finished_line(meter) == "evaluate merges: 4 merges in 50 s, 12 s/merge"


def test_long_names_keep_both_ends():
    assert cut_middle("country_calling_code_eval", 11) == "count…_eval"
    assert cut_middle("short", 11) == "short"


def test_a_terminal_shows_one_line_per_task(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    progress = TerminalProgress()
    with progress.task("train joint", 10, "tokens") as task:
        task.advance(10)
        progress.note("a note")
        progress.note("a note")
    shown = capsys.readouterr().err.splitlines()
    assert [line for line in shown if "a note" in line] == ["a note"]
    assert all(len(line) <= 60 for line in shown)
    assert "train joint" in shown[-1] and "100 %" in shown[-1] and "in 0:00" in shown[-1]
