"""Numbers for people keep three digits and a unit at every size."""

import pytest

from merit_fast.units import human_bytes, human_count, human_time


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.2512, "0.251"),
        (28, "28"),
        (999, "999"),
        (999.6, "1 k"),
        (12_345, "12.3 k"),
        (184_123_456, "184 M"),
        (-2_500, "-2.5 k"),
        (7.2e9, "7.2 G"),
        (1.25e16, "12,500 T"),
    ],
)
def test_counts(number, text):
    assert human_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1000, "0.977 KiB"),
        (6_441_680, "6.14 MiB"),
        (58 << 30, "58 GiB"),
        (3 << 40, "3 TiB"),
    ],
)
def test_bytes(number, text):
    assert human_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.417, "0.42 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.7, "1 h 0 min"),
        (7_800, "2 h 10 min"),
    ],
)
def test_times(seconds, text):
    assert human_time(seconds) == text
