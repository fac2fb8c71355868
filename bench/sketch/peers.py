"""Per-example gradients and their projections by other libraries.

Each is compared with the plain step of its own process.

    python -m bench.sketch.peers DIR [--peers DIR] [--only opacus,less] [--rounds 5] [--threads 1,2]
    [--quick]

Model and batch are those of bench/sketch/step.py (31 M parameters, fp32, B=8, T=128). Peers run in
their own environment, made at the first use (bench/sketch/peers_env.py); a peer that it lacks is
reported as missing. The rows compute different things, as their names tell: compare rows of one
kind. Every row's result is checked against exact gradients before it is timed. Finished rows are
kept in DIR as lines of JSON.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.merge.commands import version
from bench.merge.rows import ROOT
from bench.sketch import peers_env
from bench.support.measure import Results, machine, run_child, spread

# peer -> package that must be installed
NEEDS = {
    "merit-fast": None,
    "less": "torch",
    "opacus": "opacus",
    "bergson": "bergson",
    "dattri": "dattri",
    "dattri-llm": "dattri-llm",
    "trak": "traker",
}


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_peer(
    peer: str, python: Path, arguments: argparse.Namespace, threads: int
) -> dict[str, Any]:
    command: list[str | Path] = [
        python,
        "-m",
        "bench.sketch.peer_steps",
        peer,
        "--rounds",
        str(arguments.rounds),
    ]
    command += ["--threads", str(threads), *(["--quick"] if arguments.quick else [])]
    return run_child(command, {"HF_HUB_OFFLINE": "1"}, ROOT)


def measure(
    arguments: argparse.Namespace, python: Path | None, words: dict[str, str], results: Results
) -> None:
    for threads in arguments.threads:
        for peer in arguments.only:
            entries = results.of("peer")
            if any(e["peer"] == peer and e["threads"] == threads for e in entries):
                continue
            package = NEEDS[peer]
            word = words.get(package, "") if package else ""
            if package and (python is None or not word[:1].isdigit()):
                reason = word or words.get("environment", "is not installed")
                result: dict[str, Any] = {"error": reason}
            else:
                own_python = Path(sys.executable)
                interpreter = own_python if python is None or not package else python
                result = run_peer(peer, interpreter, arguments, threads)
            results.add({"peer": {"peer": peer, "threads": threads, "result": result}})
            note(f"{peer}, {threads} thread(s): {result.get('error', 'done')}")


def by_step(result: dict[str, Any], key: str) -> dict[str, list[float]]:
    """Seconds of each step, in the order of the rounds."""
    seconds: dict[str, list[float]] = {}
    for name, value in result.items():
        number, _, rest = name.partition("/")
        step, _, measured = rest.rpartition("/")
        if number.isdigit() and measured == key:
            seconds.setdefault(step, []).append(value)
    return seconds


def report(results: Results, circumstances: dict[str, Any]) -> str:
    words = ", ".join(f"{key} {value}" for key, value in circumstances["machine"].items())
    versions = ", ".join(f"{name} {word}" for name, word in circumstances["peers"].items())
    lines = [
        f"Commit {circumstances['version']}; {words}. Peers: {versions}.",
        "Medians (IQR); ratios to the plain step of the same round. "
        "Peak: of the whole process, its check included.",
    ]
    for threads in dict.fromkeys(entry["threads"] for entry in results.of("peer")):
        lines += [
            "",
            f"**{threads} thread(s)**",
            "",
            "| | CPU s | CPU ratio (range) | wall ratio | plain CPU s | peak MiB |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for entry in results.of("peer"):
            if entry["threads"] == threads:
                lines += _rows(entry["peer"], entry["result"])
    return "\n".join(lines)


def _rows(peer: str, result: dict[str, Any]) -> list[str]:
    if "error" in result:
        return [f"| {peer} | failed: {result['error']} | | | | |"]
    cpu = by_step(result, "cpu_s")
    wall = by_step(result, "wall_s")
    plain = spread(cpu["plain"])
    lines = []
    for step in cpu:
        if step == "plain":
            continue
        each = [a / b for a, b in zip(cpu[step], cpu["plain"], strict=True)]
        walls = statistics.median(a / b for a, b in zip(wall[step], wall["plain"], strict=True))
        median, iqr = spread(cpu[step])
        ratio = f"{statistics.median(each):.3f} ({min(each):.3f}–{max(each):.3f})"
        lines.append(
            f"| {step} | {median:.3f} ({iqr:.3f}) | {ratio} "
            f"| {walls:.3f} | {plain[0]:.3f} | {result['peak_mib']:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--peers", type=Path, default=peers_env.DEFAULT, help="the peers' environment"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(NEEDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2]
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(NEEDS):
        parser.error(f"--only: must be of {', '.join(NEEDS)}, got {', '.join(sorted(unknown))}")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    wanted = any(NEEDS[peer] for peer in arguments.only)
    python, words = peers_env.find_or_make(arguments.peers) if wanted else (None, {})
    circumstances = {
        "quick": arguments.quick,
        "version": version(),
        "machine": machine(),
        "peers": words,
    }
    results = Results(
        arguments.directory / f"sketch_peers{'-quick' if arguments.quick else ''}.jsonl",
        circumstances,
    )
    measure(arguments, python, words, results)
    print(report(results, circumstances))


if __name__ == "__main__":
    main()
