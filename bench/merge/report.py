"""Markdown of the merge benchmark: a table per question, then every goal with its figure."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.merge.rows import READS, WRITES, Row
from bench.support.measure import Results, spread


@dataclass(frozen=True)
class Figures:
    """All finished rounds; a round maps a row's name to the result of ``run_child``."""

    rounds: dict[str, list[dict[str, Any]]]
    rows: dict[str, list[Row]]
    bits: dict[str, Any]

    @classmethod
    def read(cls, results: Results, rows: dict[str, list[Row]]) -> "Figures":
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
        for record in results.of("round"):
            rounds[record["group"]].append(record["rows"])
        return cls(rounds, rows, (results.of("bits") or [{}])[-1])

    def values(self, group: str, name: str, key: str = "wall_s") -> dict[int, float]:
        """One figure of a row by round; empty if the row did not run."""
        results = [rows.get(name, {}) for rows in self.rounds[group]]
        return {number: row[key] for number, row in enumerate(results) if key in row}

    def error(self, group: str, name: str) -> str | None:
        """The first error of a row."""
        return next(
            (rows[name]["error"] for rows in self.rounds[group] if "error" in rows.get(name, {})),
            None,
        )

    def least(self, group: str, names: Iterable[str]) -> dict[int, float]:
        """The lowest of several floors in every round."""
        sides = [self.values(group, name, "inner_wall_s") for name in names]
        sides = [side for side in sides if side]
        return {
            number: min(side[number] for side in sides if number in side)
            for side in sides[:1]
            for number in side
        }


def ratio(above: dict[int, float], below: dict[int, float]) -> tuple[float, str] | None:
    """Median over median of the common rounds, and the range of the ratios of single rounds."""
    shared = sorted(above.keys() & below.keys())
    if not shared:
        return None
    value = statistics.median(above[n] for n in shared) / statistics.median(
        below[n] for n in shared
    )
    each = [above[n] / below[n] for n in shared]
    return value, f"{value:.2f}× ({min(each):.2f}–{max(each):.2f}, {len(shared)} rounds)"


def report(figures: Figures, circumstances: dict[str, Any]) -> str:
    parts = [_preface(figures, circumstances)]
    wall = {
        "linear": "Four models, page cache warm",
        "cold": "Four models, inputs not in the page cache",
    }
    wall |= {
        "ties": "TIES, density 0.5, base and four models, warm",
        "slerp": "SLERP of two models, warm",
    }
    for group, title in wall.items():
        parts.append(
            _table(figures, group, f"{title}: whole processes, start-up included", "wall_s")
        )
        if group in ("linear", "cold"):
            parts.append(
                _table(
                    figures, group, f"{title}: imports before the clock, and floors", "inner_wall_s"
                )
            )
    parts += [
        _table(figures, "startup", "Start-up", "wall_s"),
        _bandwidth(figures),
        _bits(figures),
        _goals(figures),
    ]
    return "\n\n".join(section for section in parts if section)


def _preface(figures: Figures, circumstances: dict[str, Any]) -> str:
    loads = [
        row["load"]
        for rounds in figures.rounds.values()
        for rows in rounds
        for row in rows.values()
        if "load" in row
    ]
    machine = circumstances["machine"]
    words = ", ".join(f"{name} {value}" for name, value in machine.items())
    load = f"Load average before each run: {min(loads):.2f} to {max(loads):.2f}." if loads else ""
    subject = f"Size {circumstances['size']}, commit {circumstances['version']}"
    method = "Medians and interquartile ranges. mergekit runs fewer rounds where it takes minutes."
    return f"{subject}; {words}; {circumstances['mergekit']}.\n{load} {method}"


def _table(figures: Figures, group: str, title: str, key: str) -> str:
    """Rows that have ``key``; with whole processes also their CPU seconds and peak memory."""
    whole = key == "wall_s"
    ours = figures.values(group, "command" if whole else "library", key)
    lines = []
    for row in figures.rows[group]:
        if whole and row.inner:
            continue
        if error := figures.error(group, row.name):
            lines.append(f"| {row.label} | failed: {error} |" + " |" * (4 if whole else 2))
        elif values := figures.values(group, row.name, key):
            cells = _cells(figures, group, row.name, key, values)
            against = ratio(values, ours)
            lines.append(f"| {row.label} | {cells} | {f'{against[0]:.2f}' if against else '–'} |")
    if not lines:
        return ""
    columns = "s | IQR | rounds | CPU s | peak MiB" if whole else "s | IQR | rounds | CPU s"
    head = f"| | {columns} | against merit-fast |"
    return "\n".join([f"**{title}**", "", head, "|" + "---|" * (head.count("|") - 1), *lines])


def _cells(figures: Figures, group: str, name: str, key: str, values: dict[int, float]) -> str:
    median, iqr = spread(list(values.values()))
    cpu = list(figures.values(group, name, key.replace("wall", "cpu")).values())
    cells = [
        f"{median:.3f}",
        f"{iqr:.3f}",
        str(len(values)),
        f"{spread(cpu)[0]:.2f}" if cpu else "–",
    ]
    if key == "wall_s":
        cells.append(f"{max(figures.values(group, name, 'peak_mib').values()):.1f}")
    return " | ".join(cells)


def _bandwidth(figures: Figures) -> str:
    lines = []
    for kind in ("memcpy_1", "triad_1", "memcpy_2", "triad_2"):
        if values := list(figures.values("linear", "memory", f"{kind}_gb_per_s").values()):
            name, threads = kind.split("_")
            median, iqr = spread(values)
            lines.append(f"| {name}, {threads} thread(s) | {median:.1f} | {iqr:.1f} |")
    return (
        "\n".join(["**Memory bandwidth**", "", "| | GB/s | IQR |", "|---|---|---|", *lines])
        if lines
        else ""
    )


def _bits(figures: Figures) -> str:
    if not figures.bits:
        return ""
    lines = [
        f"| {name} | {count:,} |" if isinstance(count, int) else f"| {name} | failed: {count} |"
        for name, count in figures.bits.items()
    ]
    title = (
        "**Elements that differ from the fp64 sum rounded once** (other methods: from each other)"
    )
    caution = (
        "With weights in tenths, one mean in eleven lies midway between two bf16 values: "
        "there rounded weights decide."
    )
    return "\n".join([title, "", "| | elements |", "|---|---|", *lines, "", caution])


def _goals(figures: Figures) -> str:
    v = figures.values
    inner = "inner_wall_s"
    library = v("linear", "library", inner)
    fsynced = v("linear", "library-fsync", inner)
    memory = v("linear", "memory", inner)
    reads = figures.least("cold", READS)
    writes = figures.least("linear", WRITES)
    command = v("linear", "command")
    durable = v("linear", "command-fsync")
    page_cache = v("linear", "page-cache", inner)
    cold = v("cold", "library", inner)
    theirs = v("linear", "mergekit-inner", inner)
    goals: list[tuple[str, dict[int, float], dict[int, float], str, float]] = [
        ("warm, whole command against mergekit", v("linear", "mergekit"), command, "≥", 25),
        ("warm, imports removed on both sides", theirs, library, "≥", 12),
        ("warm, library call against the memory-traffic floor", library, memory, "≤", 2.0),
        ("– the whole command", command, memory, "", 0),
        ("– the library call against the page-cache floor", library, page_cache, "", 0),
        ("warm and fsynced, library call against the write floor", fsynced, writes, "≤", 1.3),
        ("– the whole command", durable, writes, "", 0),
        ("cold, library call against the disk-read floor", cold, reads, "≤", 1.2),
        ("– the whole command", v("cold", "command"), reads, "", 0),
        (
            "TIES, whole command against mergekit",
            v("ties", "mergekit"),
            v("ties", "command"),
            "≥",
            50,
        ),
    ]
    lines = [
        *(_against(*goal) for goal in goals),
        *_memory_goals(figures),
        "| four 7B-shaped models | `python -m bench.merge.from_disk DIR` "
        "| runs, memory as above | |",
        _bits_goal(figures),
    ]
    head = ["**Goals**", "", "| | measured | goal | |", "|---|---|---|---|"]
    return "\n".join([*head, *lines])


def _against(
    title: str, above: dict[int, float], below: dict[int, float], sign: str, bound: float
) -> str:
    measured = ratio(above, below)
    if measured is None:
        return f"| {title} | not measured | {f'{sign} {bound}×' if sign else ''} | |"
    test: dict[str, Callable[[float], bool]] = {
        "≥": lambda x: x >= bound,
        "≤": lambda x: x <= bound,
    }
    verdict = "" if not sign else "reached" if test[sign](measured[0]) else "**missed**"
    return f"| {title} | {measured[1]} | {f'{sign} {bound}×' if sign else ''} | {verdict} |"


def _memory_goals(figures: Figures) -> list[str]:
    lines = []
    library = figures.values("linear", "library", "inner_peak_mib")
    imports = figures.values("linear", "library", "imports_mib")
    command = figures.values("linear", "command", "peak_mib")
    if library:
        peak = max(library.values())
        after_imports = max(library[n] - imports[n] for n in library)
        words = f"{peak:.1f} MiB, {after_imports:.1f} of it after the imports"
        verdict = _verdict(peak <= 32)
        lines.append(
            f"| peak memory, process of the library call | {words} | ≤ 32 MiB | {verdict} |"
        )
    if command:
        peak = max(command.values())
        lines.append(
            f"| peak memory, whole command | {peak:.1f} MiB | ≤ 64 MiB | {_verdict(peak <= 64)} |"
        )
    return lines


def _bits_goal(figures: Figures) -> str:
    ours = {name: count for name, count in figures.bits.items() if name.startswith("merit-fast, ")}
    counts = [count for count in ours.values() if isinstance(count, int)]
    if not counts:
        return "| differing bits against fp64 rounded once | not measured | 0 | |"
    failed = f", {len(ours) - len(counts)} settings failed" if len(ours) > len(counts) else ""
    words = f"{sum(counts)} elements in {len(counts)} settings{failed}"
    verdict = _verdict(not sum(counts) and not failed)
    return f"| differing bits against fp64 rounded once | {words} | 0 | {verdict} |"


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**missed**"
