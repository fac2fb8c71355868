"""The text of progress: one line of a log, and one line of a terminal of any width."""

import time
from collections.abc import Callable

from merit_fast.units import human_count, human_time

_NAME_WIDTH = 28
_NARROW_NAME_WIDTH = 20
_NARROW = 80  # columns below which names are cut and times are short
_BAR_WIDTHS = (10, 30)
_SPEED_AFTER_S = 0.5  # before that a rate says nothing


class Meter:
    """Amounts of one task: done in all, and done by an earlier run (which gives no rate)."""

    def __init__(
        self, name: str, total: float, unit: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.clock = clock
        self.done = 0.0
        self.skipped = 0.0
        self.detail = ""
        self.started = clock()

    def advance(self, amount: float, detail: str = "") -> None:
        self.done += amount
        self.detail = detail or self.detail

    def skip(self, amount: float) -> None:
        self.done += amount
        self.skipped += amount

    @property
    def share(self) -> float:
        return min(1.0, self.done / self.total) if self.total > 0 else 1.0

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self.started

    @property
    def speed(self) -> float | None:
        """Units per second of this run; None while nothing is known."""
        worked = self.done - self.skipped
        if worked <= 0 or self.elapsed_s < _SPEED_AFTER_S:
            return None
        return worked / self.elapsed_s

    @property
    def left_s(self) -> float | None:
        """Estimate of the seconds left; None while nothing is known."""
        speed = self.speed
        return None if speed is None else max(0.0, self.total - self.done) / speed

    @property
    def rate(self) -> str:
        """The speed in words: ``12.3 k tokens/s``, or ``2.5 s/model`` below one a second."""
        speed = self.speed
        if speed is None:
            return ""
        if speed >= 1.0:
            return f"{human_count(speed)} {self.unit}/s"
        return f"{human_time(1 / speed)}/{self.unit.removesuffix('s')}"


def log_line(meter: Meter) -> str:
    """The state of a task for a log.

    ``train joint: 40 %, 1.2 k tokens/s, 12 s elapsed, 18 s left, loss 1.234``
    """
    left = f"{human_time(meter.left_s)} left" if meter.left_s is not None else ""
    parts = (meter.rate, f"{human_time(meter.elapsed_s)} elapsed", left, meter.detail)
    return f"{meter.name}: {100 * meter.share:.0f} %, " + ", ".join(filter(None, parts))


def finished_line(meter: Meter) -> str:
    """The outcome of a task: ``train joint: 5.66 k tokens in 38 s, 150 tokens/s``."""
    worked = meter.done - meter.skipped
    earlier = f" ({human_count(meter.skipped)} done earlier)" if meter.skipped else ""
    rate = f", {meter.rate}" if meter.rate else ""
    amount = f"{human_count(worked)} {meter.unit}"
    return f"{meter.name}: {amount} in {human_time(meter.elapsed_s)}{rate}{earlier}"


def bar_line(meter: Meter, width: int, ascii_only: bool = False) -> tuple[str, str, str]:
    """The text before the bar, the bar and the text after it, for a terminal of ``width`` columns.

    Where the line is too long the rate goes first and the detail second, then the bar shrinks to
    ten columns. Percent, bar and time stay.
    """
    room = _NARROW_NAME_WIDTH if width < _NARROW else _NAME_WIDTH
    name = f"{cut_middle(meter.name, room):<{room}} "
    always = f" {100 * meter.share:3.0f} %  {_times(meter, width)}"
    shortest, longest = _BAR_WIDTHS
    free = width - 1 - len(name) - len(always)  # a full last column would wrap in some terminals
    optional = [part for part in (meter.rate, meter.detail) if part]
    while optional and shortest + sum(len(part) + 2 for part in optional) > free:
        optional.pop(0)
    tail = "".join(f"  {part}" for part in optional)
    cells = max(shortest, min(longest, free - len(tail)))
    filled = int(cells * meter.share)
    full, empty = ("#", "-") if ascii_only else ("━", "─")
    return name, full * filled + empty * (cells - filled), always + tail


def cut_middle(text: str, width: int) -> str:
    """``text`` with at most ``width`` characters; its middle goes, since its ends tell most."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def _times(meter: Meter, width: int) -> str:
    elapsed = _clock(meter.elapsed_s)
    if meter.share >= 1.0:
        return f"in {elapsed}"
    left = f"{_clock(meter.left_s)} left" if meter.left_s is not None else "-:-- left"
    return left if width < _NARROW else f"{elapsed} elapsed, {left}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
