"""Selects the rows of each dataset's part: sample, weight, held-out share, duplicates, leaks."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.config import DataConfig, DatasetConfig, Part, source
from merit_fast.data.mixture.checks import check_mixture
from merit_fast.data.mixture.held_out import holds_out
from merit_fast.data.mixture.leaks import HeldOut, HeldOutRows
from merit_fast.data.mixture.notes import count_of_rows, source_notes
from merit_fast.data.mixture.scan import (
    Keys,
    Scan,
    cached_scan,
    place_of,
    reading_keys,
    scan_source,
)
from merit_fast.data.sources import Source
from merit_fast.errors import InputError
from merit_fast.manifests.io import fingerprint


@dataclass(frozen=True, eq=False)
class Selection:
    """The rows of one dataset's part.

    Attributes:
        name: the dataset's name.
        rows: [n] numbers of the rows in the source, from 0, ascending, each once.
        order: [m] the part's rows in order, as positions in ``rows``; 0 to n - 1 unless
            ``weight`` repeats rows.
        keys: [n] S16, equal for equal conversations.
        notes: sentences for the plan.
        errors: one line for each wrong row that is skipped.
        num_leaks: rows that are held out too, anywhere in the mixture.
    """

    name: str
    rows: NDArray[np.int64]
    order: NDArray[np.int64]
    keys: Keys
    notes: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    num_leaks: int = 0

    @functools.cached_property
    def content(self) -> str:
        """32 hex digits of the rows' conversations in their order, whatever files they are from."""
        return hashlib.blake2b(self.keys.tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class ScanCache:
    """A folder that keeps scans for other processes.

    Attributes:
        directory: holds one file for each scan.
        content: the fingerprint of a source's rows and their images, for an entry; None: it has
            none and is not kept.
    """

    directory: Path
    content: Callable[[DatasetConfig, Source], str | None]


class MixtureRows:
    """The rows of a whole mixture. Each source is read once, when a part first needs it.

    Args:
        configs: the entries of `mixture:`.
        data_config: the `data:` section.
        cache: keeps the scans; None: they stay in memory.

    Raises:
        InputError: the entries break a rule that needs no row.
    """

    def __init__(
        self,
        configs: Sequence[DatasetConfig],
        data_config: DataConfig,
        cache: ScanCache | None = None,
    ) -> None:
        check_mixture(configs)
        self.configs = tuple(configs)
        self.data_config = data_config
        self._cache = cache
        self._scans: dict[str, Scan] = {}
        self._selections: dict[Part, dict[str, Selection]] = {}

    def select(self, part: Part) -> dict[str, Selection]:
        """Dataset's name -> its rows of this part, without datasets that have none.

        Raises:
            InputError: a source is unreadable, too many rows are wrong, a key leaves no row, or
                training rows are held out and ``data.leaks`` is error.
        """
        if part not in self._selections:
            self._selections[part] = {
                config.name: self._select(config, part)
                for config in self.configs
                if source(config, part)
            }
        return self._selections[part]

    def shared_rows(self) -> dict[tuple[str, str], int]:
        """(name, name) -> training conversations that both datasets hold, where there are any."""
        selections = self.select("train")
        keys = {name: np.unique(selection.keys) for name, selection in selections.items()}
        names = list(keys)
        counts = {
            (first, second): len(np.intersect1d(keys[first], keys[second], assume_unique=True))
            for i, first in enumerate(names)
            for second in names[i + 1 :]
        }
        return {pair: count for pair, count in counts.items() if count}

    def _select(self, config: DatasetConfig, part: Part) -> Selection:
        scan = self._scan(config, part)
        notes = source_notes(config, part)
        if scan.num_left_out:
            notes.append(f"{count_of_rows(scan.num_left_out)} left out by keep_if")
        chosen = self._of_part(config, scan, part)
        chosen = self._without_duplicates(scan, chosen, notes)
        num_leaks = 0
        if part == "train":
            if self.data_config.leaks == "drop":
                chosen, num_leaks = self._without_leaks(config, scan, chosen, notes)
            chosen = self._sampled(config, scan, chosen)
            if self.data_config.leaks != "drop":
                num_leaks = self._count_leaks(config, scan, chosen, notes)
            self._note_prompts(scan, chosen, notes)
        if not len(chosen):
            first = f"; the first wrong row: {scan.errors[0]}" if scan.errors else ""
            raise InputError(
                f"mixture: {config.name}: must have at least one row of {part}, found none in "
                f"{scan.num_rows} rows{first}"
            )
        order = self._order(config, scan.keys[chosen], part)
        return Selection(
            config.name,
            scan.rows[chosen],
            order,
            scan.keys[chosen],
            tuple(notes),
            scan.errors,
            num_leaks,
        )

    def _scan(self, config: DatasetConfig, part: Part) -> Scan:
        place = source(config, part)
        assert place is not None
        reading = fingerprint(reading_keys(config, self.data_config))
        name = f"{place}{reading}"
        if name not in self._scans:
            content = self._cache.content(config, place) if self._cache else None

            def make() -> Scan:
                return scan_source(place, config, self.data_config)

            if self._cache is None or content is None:
                self._scans[name] = make()
            else:
                mark = fingerprint({"content": content, "reading": reading})
                self._scans[name] = cached_scan(self._cache.directory, mark, make)
        return self._scans[name]

    def _of_part(self, config: DatasetConfig, scan: Scan, part: Part) -> NDArray[np.int64]:
        """Positions in the scan of the rows of one part."""
        if config.eval_share is None:
            return np.arange(len(scan.rows))
        is_held_out = holds_out(scan.keys, config.eval_share)
        chosen = np.flatnonzero(is_held_out == (part == "eval"))
        if len(scan.rows) and not len(chosen):
            raise InputError(
                f"mixture: {config.name}: eval_share: must leave rows on both sides, got "
                f"{config.eval_share:g}, which leaves none of {len(scan.rows)} rows to {part}"
            )
        return chosen

    def _without_duplicates(
        self, scan: Scan, chosen: NDArray[np.int64], notes: list[str]
    ) -> NDArray[np.int64]:
        _, first = np.unique(scan.keys[chosen], return_index=True)
        count = len(chosen) - len(first)
        if not count:
            return chosen
        if self.data_config.duplicates == "drop":
            notes.append(f"{count_of_rows(count)} dropped: the dataset holds an equal row before")
            return chosen[np.sort(first)]
        notes.append(
            f"{count_of_rows(count)} equal to an earlier row (data.duplicates: drop removes them)"
        )
        return chosen

    def _sampled(
        self, config: DatasetConfig, scan: Scan, chosen: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        chosen = chosen[: config.max_examples]
        if config.sample is None:
            return chosen
        if config.sample > len(chosen):
            raise InputError(
                f"mixture: {config.name}: sample: must be at most the {len(chosen)} training "
                f"rows, got {config.sample}"
            )
        return chosen[self._random(scan.keys[chosen], config.sample, "sample")]

    def _order(self, config: DatasetConfig, keys: Keys, part: Part) -> NDArray[np.int64]:
        """Positions of the rows, each as often as ``weight`` asks for."""
        positions = np.arange(len(keys))
        if part == "eval" or config.weight == 1:
            return positions
        total = round(config.weight * len(keys))
        if not total:
            raise InputError(
                f"mixture: {config.name}: weight: must leave at least one of {len(keys)} "
                f"training rows, got {config.weight:g}"
            )
        counts = np.full(len(keys), total // len(keys))
        counts[self._random(keys, total % len(keys), "weight")] += 1
        return np.repeat(positions, counts)

    def _random(self, keys: Keys, count: int, purpose: str) -> NDArray[np.int64]:
        """Ascending positions of ``count`` rows, drawn by the seed and the rows' content."""
        salt = f"{purpose}\n{self.data_config.seed}\n".encode()
        lots = (hashlib.blake2b(salt + key, digest_size=8).digest() for key in keys.tolist())
        numbers = np.fromiter((int.from_bytes(lot, "big") for lot in lots), np.uint64, len(keys))
        return np.sort(np.argsort(numbers, kind="stable")[:count])

    @functools.cached_property
    def _held_out(self) -> HeldOut:
        """The held-out rows of every dataset."""
        found = []
        for config in self.configs:
            place = source(config, "eval")
            if place:
                scan = self._scan(config, "eval")
                positions = self._of_part(config, scan, "eval")
                found.append(HeldOutRows(config.name, place, scan, positions))
        return HeldOut(found)

    def _without_leaks(
        self, config: DatasetConfig, scan: Scan, chosen: NDArray[np.int64], notes: list[str]
    ) -> tuple[NDArray[np.int64], int]:
        leaks = self._held_out.holds(scan.keys[chosen])
        count = int(leaks.sum())
        if count:
            notes.append(f"{count_of_rows(count)} dropped: held out too, in this mixture")
        if len(chosen) and count == len(chosen):
            raise InputError(
                f"mixture: {config.name}: data.leaks: must leave training rows, "
                f"all {count} are held out too"
            )
        return chosen[~leaks], count

    def _count_leaks(
        self, config: DatasetConfig, scan: Scan, chosen: NDArray[np.int64], notes: list[str]
    ) -> int:
        leaks = self._held_out.holds(scan.keys[chosen])
        count = int(leaks.sum())
        if count and self.data_config.leaks == "error":
            raise self._leak_error(config, scan, chosen[leaks])
        if count:
            notes.append(f"{count_of_rows(count)} held out too, and trained (data.leaks: keep)")
        return count

    def _leak_error(
        self, config: DatasetConfig, scan: Scan, leaks: NDArray[np.int64]
    ) -> InputError:
        """Names the first leak on both sides."""
        place = source(config, "train")
        assert place is not None
        more = f" and {len(leaks) - 1} more" if len(leaks) > 1 else ""
        other, held_out_place = self._held_out.find(scan.keys[leaks[0]])
        return InputError(
            f"mixture: {config.name}: training rows must not be held out too, got "
            f"{place_of(place, int(scan.rows[leaks[0]]))}{more}; {other} holds out "
            f"{held_out_place} (data.leaks: drop takes them out of the training)"
        )

    def _note_prompts(self, scan: Scan, chosen: NDArray[np.int64], notes: list[str]) -> None:
        """Notes the rows that ask what a held-out row asks, and answer something else."""
        asks = self._held_out.asks(scan.prompts[chosen])
        count = int((asks & ~self._held_out.holds(scan.keys[chosen])).sum())
        if count:
            notes.append(
                f"{count_of_rows(count)} with the prompt of a held-out row and another answer"
            )
