"""The checkpoints of one run in the order of their steps, and the weights of their average.

With checkpoints θ_0 … θ_k at steps s_0 < … < s_k, the average Σ c_j θ_j equals θ_0 plus every
update between the checkpoints i - 1 and i, times w_i = c_i + … + c_k. So a decay of the learning
rate that multiplies those updates by w_i is the average with

    c_0 = 1 - w_1,   c_j = w_j - w_{j+1},   c_k = w_k

as long as the updates themselves do not depend on it (WSM, arXiv 2507.17634, theorem 3.1).
"""

import fnmatch
import glob
import itertools
import math
import os
import re
from collections.abc import Sequence

from merit_fast.errors import InputError
from merit_fast.merge.read.files import is_directory, quote
from merit_fast.merge.read.remote import Location, RemotePath, as_location
from merit_fast.records import record

SCHEDULES = ("uniform", "linear", "minus-sqrt", "ema:BETA")


@record
class Trajectory:
    """Checkpoints by step, each with its step and its weight; the weights sum to 1."""

    paths: tuple[Location, ...]
    steps: tuple[int, ...]
    weights: tuple[float, ...]


def read_trajectory(pattern: str, schedule: str = "uniform", last: int | None = None) -> Trajectory:
    """Lists the checkpoints that a pattern names and weighs them by a schedule.

    With x = (s - s_0) / (s_k - s_0) and the decay d(x), w_i is the mean of d between the steps
    s_{i-1} and s_i:

        uniform     c_j = 1 / (k + 1)
        linear      d = 1 - x
        minus-sqrt  d = 1 - sqrt(x)
        ema:BETA    e = θ_0, then e = BETA e + (1 - BETA) θ_j: c_j = (1 - BETA) BETA^(k - j), but
                    c_0 = BETA^k
        FILE        a line for each checkpoint: its folder's name and its weight; weights are
                    divided by their sum

    Args:
        pattern: a path or URL with ``*``, ``?`` or ``[...]``; of a URL only in the last part.
        schedule: one of the above.
        last: only so many checkpoints, those with the highest steps. None: all.

    Raises:
        InputError: nothing matches, a match is no directory or has no step number, two have the
            same step; the schedule is unknown, or its file and the checkpoints do not match.
    """
    paths = _matches(pattern)
    numbered = sorted(zip(_steps(paths), paths, strict=True), key=lambda pair: pair[0])
    for (step, path), (other, following) in itertools.pairwise(numbered):
        if step == other:
            raise InputError(f"trajectory: {path} and {following} are of the same step {step}")
    if last is not None:
        if not 1 <= last <= len(numbered):
            raise InputError(f"trajectory: last must be 1 to {len(numbered)}, got {last}")
        numbered = numbered[-last:]
    steps = tuple(step for step, _ in numbered)
    chosen = tuple(path for _, path in numbered)
    return Trajectory(chosen, steps, _weights(schedule, chosen, steps))


def decay_weights(decays: Sequence[float]) -> tuple[float, ...]:
    """[k + 1] weights c of the checkpoints, from [k] factors w of the updates between them."""
    ends = (1.0, *decays, 0.0)
    return tuple(before - after for before, after in itertools.pairwise(ends))


def _matches(pattern: str) -> list[Location]:
    location = as_location(pattern)
    if isinstance(location, RemotePath):
        parent = location.parent
        found: list[Location] = [
            parent / name
            for name in parent.entries(fresh=True)
            if fnmatch.fnmatchcase(name, location.name)
        ]
    else:
        found = [as_location(text) for text in glob.glob(os.path.expanduser(str(location)))]
    if not found:
        raise InputError(f"trajectory: {pattern}: names no checkpoint")
    for path in found:
        if not is_directory(path):
            raise InputError(f"trajectory: {path}: is no directory; narrow the pattern")
    return found


def _steps(paths: Sequence[Location]) -> list[int]:
    """The number in which the paths differ; of a single path, the last number of its name."""
    texts = [str(path) for path in paths]
    if len(texts) == 1:
        numbers = re.findall(r"\d+", paths[0].name)[-1:]
        if not numbers:
            raise InputError(f"trajectory: {paths[0]}: has no step number in its name")
        return [int(numbers[0])]
    pieces = [re.split(r"(\d+)", text) for text in texts]
    shape = pieces[0][::2]
    for path, parts in zip(paths, pieces, strict=True):
        if parts[::2] != shape:
            rule = f"must differ from {paths[0]} in one number"
            raise InputError(f"trajectory: {path}: {rule}; narrow the pattern")
    columns = list(zip(*(parts[1::2] for parts in pieces), strict=True))
    differing = [column for column in columns if len(set(column)) > 1]
    if len(differing) != 1:
        rule = "must differ in one number, the step"
        raise InputError(
            f"trajectory: {paths[0]} and the others {rule}, differ in {len(differing)}"
        )
    return [int(number) for number in differing[0]]


def _weights(schedule: str, paths: Sequence[Location], steps: Sequence[int]) -> tuple[float, ...]:
    count = len(paths)
    name, _, beta = schedule.partition(":")
    if schedule == "uniform":
        return (1.0 / count,) * count
    if schedule in ("linear", "minus-sqrt"):
        return (1.0,) if count == 1 else decay_weights(_decays(schedule, steps))
    if name == "ema":
        return _ema(beta, count)
    if os.path.isfile(schedule):
        return _from_file(schedule, paths)
    choices = ", ".join(SCHEDULES)
    raise InputError(
        f"trajectory: schedule must be one of {choices}, or a file of names and weights, got "
        f"{quote(schedule)}"
    )


def _decays(schedule: str, steps: Sequence[int]) -> list[float]:
    """Mean of the decay between neighbouring checkpoints, by its integral."""
    length = steps[-1] - steps[0]
    places = [(step - steps[0]) / length for step in steps]

    def integral(x: float) -> float:
        return x - x * x / 2 if schedule == "linear" else x - 2 / 3 * x * math.sqrt(x)

    return [
        (integral(after) - integral(before)) / (after - before)
        for before, after in itertools.pairwise(places)
    ]


def _ema(text: str, count: int) -> tuple[float, ...]:
    try:
        beta = float(text)
    except ValueError:
        beta = math.nan
    if not 0 <= beta < 1:
        raise InputError(f"trajectory: ema:BETA: BETA must be from 0 to below 1, got {quote(text)}")
    weights = [(1 - beta) * beta ** (count - 1 - j) for j in range(count)]
    weights[0] = beta ** (count - 1)
    return tuple(weights)


def _from_file(file: str, paths: Sequence[Location]) -> tuple[float, ...]:
    given: dict[str, float] = {}
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            where = f"{file}: line {number}"
            weight = _number(words[-1])
            if len(words) != 2 or weight is None:
                raise InputError(f"{where}: must be a name and a number, got {quote(line.strip())}")
            if words[0] in given:
                raise InputError(f"{where}: {quote(words[0])} stands twice")
            given[words[0]] = weight
    names = [path.name for path in paths]
    if len(set(names)) != len(names):
        raise InputError(f"{file}: cannot name the checkpoints: {names[0]} is the name of several")
    if unknown := [name for name in given if name not in names]:
        raise InputError(f"{file}: {quote(unknown[0])}: is no checkpoint of the trajectory")
    if missing := [name for name in names if name not in given]:
        raise InputError(f"{file}: {quote(missing[0])}: has no weight")
    total = sum(given.values())
    if abs(total) < 1e-12:
        raise InputError(f"{file}: weights must have a sum other than 0")
    return tuple(given[name] / total for name in names)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
