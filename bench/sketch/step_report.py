"""Markdown of ``sketch_step``'s results: a table per case, memory, the 7B model, the goals."""

import statistics
from collections.abc import Iterable
from typing import Any

from bench.support.measure import Results, spread

MIB = 2**20
RATIOS = {
    "sketch": "plain",
    "sketch, first pass": "plain",
    "frozen": "plain",
    "sketch, oneDNN": "plain, oneDNN",
    "training + sum": "training",
}
# (start of the case's name, variant, largest ratio)
GOALS = (
    ("31m, fp32, T=128", "sketch", 0.90),
    ("31m, fp32, T=512", "sketch", 0.85),
    ("31m, bf16, T=128", "sketch", 1.00),
    ("31m, bf16, T=512", "sketch", 1.00),
    ("SmolLM2-135M, bf16", "sketch", 1.0),
    ("MoE, fp32", "sketch", 1.3),
    ("MoE, bf16", "sketch", 1.3),
    ("31m, fp32, T=128", "training + sum", 1.02),
    ("31m, bf16, T=128", "training + sum", 1.02),
)


def report(results: Results, circumstances: dict[str, Any]) -> str:
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {}
    for entry in results.of("round"):
        rounds.setdefault(entry["case"], []).append(entry["rows"])
    words = ", ".join(f"{key} {value}" for key, value in circumstances["machine"].items())
    sections = [
        f"Commit {circumstances['version']}; {words}; D = {circumstances['proj_dim']}. Medians "
        "(IQR); ratios by round."
    ]
    sections += [_case(name, of_case) for name, of_case in rounds.items()]
    sections += [_memory(results.of("memory")), _big(results.of("7b")), _goals(rounds, results)]
    return "\n\n".join(section for section in sections if section)


def _ratios(rounds: Iterable[dict[str, Any]], variant: str, key: str) -> list[float]:
    """Ratios to the variant's baseline, round by round."""
    below = RATIOS.get(variant)
    return [
        rows[variant][key] / rows[below][key]
        for rows in rounds
        if below in rows and variant in rows
    ]


def _case(name: str, rounds: list[dict[str, dict[str, float]]]) -> str:
    head = "| | wall s | CPU s | wall ratio (range) | CPU ratio (range) | to |"
    lines = [f"**{name}**, {len(rounds)} rounds", "", head, "|---|---|---|---|---|---|"]
    for variant in rounds[0]:
        cells = []
        for key in ("wall_s", "cpu_s"):
            median, iqr = spread([rows[variant][key] for rows in rounds if variant in rows])
            cells.append(f"{median:.3f} ({iqr:.3f})")
        for key in ("wall_s", "cpu_s"):
            each = _ratios(rounds, variant, key)
            cells.append(
                f"{statistics.median(each):.3f} ({min(each):.3f}–{max(each):.3f})" if each else ""
            )
        lines.append(f"| {variant} | {' | '.join(cells)} | {RATIOS.get(variant, '')} |")
    return "\n".join(lines)


def _peak(entries: list[Any], case: str, variant: str) -> float | None:
    rows = [entry["rows"][variant] for entry in entries if entry["case"] == case]
    peaks = [row["high_mib"] for row in rows if "high_mib" in row]
    return statistics.median(peaks) if peaks else None


def _memory(entries: list[Any]) -> str:
    if not entries:
        return ""
    lines = [
        "**Peak memory, MiB (median of the children)**",
        "",
        "| | plain | frozen | sketch |",
        "|---|---|---|---|",
    ]
    for case in dict.fromkeys(entry["case"] for entry in entries):
        peaks = [_peak(entries, case, variant) for variant in ("plain", "frozen", "sketch")]
        cells = [f"{peak:.1f}" if peak is not None else "failed" for peak in peaks]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _big(entries: list[Any]) -> str:
    if not entries:
        return ""
    last = entries[-1]
    if "error" in last:
        return f"**7B-shaped model**: failed: {last['error']}"
    return (
        f"**7B-shaped model**: {last['parameters'] / 1e9:.2f} G parameters, "
        f"{last['weights_mib']:.0f} MiB of weights, {last['built_mib']:.0f} MiB when built, "
        f"{last['high_mib']:.0f} MiB at most; one frozen step {last['frozen_s']:.1f} s, "
        f"one sketched step {last['sketch_s']:.1f} s."
    )


def _goals(rounds: dict[str, list[dict[str, dict[str, float]]]], results: Results) -> str:
    lines = [
        "**Goals** (a ratio's median of all rounds; reached where wall and CPU both reach it)",
        "",
    ]
    lines += ["| | measured | must | |", "|---|---|---|---|"]
    for start, variant, bound in GOALS:
        for name in sorted(name for name in rounds if name.startswith(start)) or [start]:
            wall, cpu = (_ratios(rounds.get(name, []), variant, key) for key in ("wall_s", "cpu_s"))
            if wall:
                medians = (statistics.median(wall), statistics.median(cpu))
                words = f"wall {medians[0]:.3f}, CPU {medians[1]:.3f}"
                verdict = _verdict(max(medians) <= bound)
            else:
                words = "not measured"
                verdict = ""
            lines.append(f"| {name}: {variant} | {words} | <= {bound:.2f} | {verdict} |")
    return "\n".join([*lines, *_memory_goals(results.of("memory")), _big_goal(results.of("7b"))])


def _memory_goals(entries: list[Any]) -> list[str]:
    lines = []
    for case in dict.fromkeys(entry["case"] for entry in entries):
        plain = _peak(entries, case, "plain")
        sketch = _peak(entries, case, "sketch")
        threads = next(entry["threads"] for entry in entries if entry["case"] == case)
        bound = 8 * 65536 * 4 / MIB + threads
        if plain is None or sketch is None:
            lines.append(f"| extra peak memory, {case} | failed | <= {bound:.0f} MiB | |")
        else:
            extra = sketch - plain
            lines.append(
                f"| extra peak memory, {case} | {extra:+.1f} MiB | <= {bound:.0f} MiB | "
                f"{_verdict(extra <= bound)} |"
            )
    return lines


def _big_goal(entries: list[Any]) -> str:
    if not entries or "error" in entries[-1]:
        return "| 7B-shaped model: peak over the weights | not measured | <= 2048 MiB | |"
    extra = entries[-1]["high_mib"] - entries[-1]["weights_mib"]
    verdict = _verdict(extra <= 2048)
    return f"| 7B-shaped model: peak over the weights | {extra:.0f} MiB | <= 2048 MiB | {verdict} |"


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**missed**"
