"""One run by every executor: whether all give the same bytes, and what the division costs.

    python -m bench.launch.executors DIR [--vision | --run CONFIG.yml] [--way one ...] [--json]

Runs the quick demo, the run on images of ``bench.vision`` with 40 rows a task and one epoch, or a
run of your own, whose paths must be absolute: in one process, by units of `local`, by units on two
nodes of Ray on this machine, by units of submitit's local jobs, and on a cluster of Ray whose head
is killed after three units, so that the same command has to go to a new one. All compute with one
thread. A finished way is not run again.

Compares the hash of every file. Of JSON files that hold seconds, the hash is of the rest; the
ledger, stage.json, the page and the timings hold seconds, times or hashes of such files, and are
not compared. Ends with exit code 1 if a file differs.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from merit_fast.manifests.ledger import UNITS_FOLDER
from merit_fast.manifests.locks import LOCKS_FOLDER
from merit_fast.pipeline.units.journal import JOURNAL

_NOT_COMPARED = ("timing.json", "report.html", "arms.csv", "run.json", "stage.json")
_NO_RESULT = (UNITS_FOLDER, "tokens", LOCKS_FOLDER)
_MEASURED = re.compile(r"(^|_)(s|seconds|per_s|memory_bytes)$")  # keys of JSON, and columns
_HEAD_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
_UNITS = ["--unit-threads", "1", "--workers", "2"]


def write_demo_run(folder: Path) -> Path:
    from merit_fast.demo import write_demo

    return write_demo(folder, quick=True)


def write_vision_run(folder: Path) -> Path:
    from bench.vision.run import write_run

    folder.mkdir(parents=True)
    return write_run(folder, rows=40, epochs=1, joint=True, random=0)


# ---- ways to run
@contextmanager
def no_flags() -> Iterator[list[str]]:
    yield []


@contextmanager
def local_flags() -> Iterator[list[str]]:
    yield ["--executor", "local", *_UNITS]


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """Two nodes of one core each, in processes of this machine."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", _HEAD_PATIENCE: "10"}  # read when ray is imported
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def flags_of(cluster: Any) -> list[str]:
    return ["--executor", "ray", *_UNITS, "--executor-option", f"address={cluster.address}"]


@contextmanager
def ray_flags() -> Iterator[list[str]]:
    with ray_cluster() as cluster:
        yield flags_of(cluster)


@contextmanager
def submitit_flags() -> Iterator[list[str]]:
    yield ["--executor", "submitit", *_UNITS, "--executor-option", "cluster=local"]


WAYS: dict[str, Callable[[], Any]] = {
    "one": no_flags,
    "local": local_flags,
    "ray": ray_flags,
    "submitit": submitit_flags,
    "ray-head": ray_flags,  # after a first cluster that has lost its head
}


def run_way(folder: Path, source: Path, way: str) -> dict[str, Any]:
    """Runs the YAML with an output of its own, unless that is done; returns what it cost."""
    place = folder / way
    result = place / "result.json"
    if result.exists():
        return dict(json.loads(result.read_text()))
    place.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_load(source.read_text())
    file = place / "run.yml"
    file.write_text(yaml.safe_dump(values | {"output": str(place / "out"), "threads": 1}))
    words = [sys.executable, "-m", "merit_fast", "run", str(file), "--json"]
    if way == "ray-head":
        lose_head(words, place)
    with WAYS[way]() as flags, (place / "log").open("ab") as log:
        before = _children_s()
        begin = time.perf_counter()
        subprocess.run([*words, *flags], check=True, stdout=log, stderr=log)
        seconds = time.perf_counter() - begin
        cpu_s = _children_s() - before
    units = unit_costs(place / "out")
    cost: dict[str, Any] = {"wall_s": round(seconds, 1), "cpu_s": round(cpu_s, 1), "units": units}
    result.write_text(json.dumps(cost))
    return cost


def lose_head(words: Sequence[str], place: Path) -> None:
    """Drives a run until three units are done, kills the cluster's head, waits for the driver."""
    with ray_cluster() as cluster, (place / "log").open("ab") as log:
        driver = subprocess.Popen([*words, *flags_of(cluster)], stdout=log, stderr=log)
        while len(unit_costs(place / "out")) < 3:
            assert driver.poll() is None, f"the driver has ended; {place}/log"
            time.sleep(0.5)
        cluster.head_node.all_processes["gcs_server"][0].process.kill()
        code = driver.wait(timeout=120)
        assert code != 0, "the driver has not seen that the head is gone"


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def unit_costs(out: Path) -> dict[str, float]:
    """CPU seconds of every unit, by its own count; empty for a run of one process."""
    journal = out / UNITS_FOLDER / JOURNAL
    if not journal.exists():
        return {}
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    ended = [event for event in events if event["event"] == "end" and event["code"] == 0]
    return {event["unit"]: event["answer"]["cpu_seconds"] for event in ended}


# ---- comparison
def result_hashes(out: Path) -> dict[str, str]:
    """Hash of every file that is a result, by its path."""
    hashes = {}
    for file in sorted(out.rglob("*")):
        name = file.relative_to(out)
        if not file.is_file() or name.parts[0] in _NO_RESULT or file.name in _NOT_COMPARED:
            continue
        hashes[str(name)] = hashlib.sha256(_result_bytes(file)).hexdigest()
    return hashes


def _result_bytes(file: Path) -> bytes:
    """The file's bytes; JSON without keys that hold seconds or memory, and without paths."""
    data = file.read_bytes()
    if file.name in ("evaluate.json", "report.json"):
        return json.dumps(_without_measures(json.loads(data)), sort_keys=True).encode()
    if file.name == "metrics.jsonl":
        lines = [_without_measures(json.loads(line)) for line in data.splitlines()]
        return json.dumps(lines, sort_keys=True).encode()
    if file.name == "config.yml":
        values = yaml.safe_load(data)
        return json.dumps(values | {"output": None}, sort_keys=True).encode()
    return data


def _without_measures(value: Any) -> Any:
    if isinstance(value, dict) and {"columns", "rows"} <= value.keys():
        columns = value["columns"]
        rows = [dict(zip(columns, row, strict=True)) for row in value["rows"]]
        return [_without_measures(row) for row in rows]
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if not _MEASURED.search(key)}
        return {key: _without_measures(part) for key, part in kept.items()}
    if isinstance(value, list):
        return [_without_measures(part) for part in value]
    return value


def different_files(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Files that one of two runs lacks, or that differ."""
    names = sorted(first.keys() | second.keys())
    return [name for name in names if first.get(name) != second.get(name)]


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of every way's cost, and of the files that differ from the first way's.

    CPU seconds are those of the units, without the driver's.
    """
    lines = [
        "| way | wall s | CPU s | units | CPU s of a unit beyond one process | differs |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(results.values()))
    for way, result in results.items():
        units = result["units"]
        beyond = "–"
        if units and not first["units"]:
            beyond = f"{(sum(units.values()) - first['cpu_s']) / len(units):.1f}"
        different = ", ".join(result["different"]) or "nothing"
        cpu_s = sum(units.values()) if units else result["cpu_s"]
        numbers = f"{result['wall_s']:.0f} | {cpu_s:.0f} | {len(units)}"
        lines.append(f"| {way} | {numbers} | {beyond} | {different} |")
    return "\n".join([*lines, f"{first['files']} files are compared"])


def source_of(folder: Path, vision: bool, run: Path | None) -> tuple[Path, Path]:
    """The folder of all ways, and the run's YAML, which is made unless it is there."""
    if run is not None:
        return folder / run.stem, run.resolve()
    folder = folder / ("vision" if vision else "demo")
    source = folder / "source" / ("run.yml" if vision else "demo.yml")
    if not source.exists():
        (write_vision_run if vision else write_demo_run)(source.parent)
    return folder, source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--vision", action="store_true", help="the run on images")
    parser.add_argument("--run", type=Path, metavar="CONFIG.yml", help="a run of your own")
    parser.add_argument("--way", action="append", choices=tuple(WAYS), help="default: all")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder, source = source_of(arguments.folder.resolve(), arguments.vision, arguments.run)
    results: dict[str, dict[str, Any]] = {}
    expected: dict[str, str] = {}
    for way in arguments.way or WAYS:
        cost = run_way(folder, source, way)
        hashes = result_hashes(folder / way / "out")
        expected = expected or hashes
        differences = different_files(expected, hashes)
        results[way] = cost | {"files": len(hashes), "different": differences}
    print(json.dumps(results) if arguments.json else table(results))
    if any(result["different"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
