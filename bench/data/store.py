"""Rows per second, memory and the second start of a token store.

    python -m bench.data.store --model DIR [--rows 200000] [--words 240] [--work FOLDER]

Every measurement is a process. plain: one process without workers, the examples in memory (on some
thousand rows). build: as many workers as cores, into files. open: the second command. Memory is
that of the building process: anonymous pages, and all with the mapped files; sampled.

    python -m bench.data.store --large 1600000 [--work FOLDER]

Opens a store of so many random examples of 300 tokens and reads some of them.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

_WORDS = ["the", "a", "model", "of", "rows", "and", "tokens", "gives", "every", "answer", "for"]


def write_rows(path: Path, count: int, words: int) -> None:
    """Writes single-turn rows of about ``words`` words."""
    generator = random.Random(0)
    with open(path, "w") as file:
        for number in range(count):
            text = " ".join(generator.choices(_WORDS, k=words - words // 3))
            answer = " ".join(generator.choices(_WORDS, k=words // 3))
            row = {"messages": [
                {"role": "system", "content": "Answer briefly."},
                {"role": "user", "content": f"{number}: {text}?"},
                {"role": "assistant", "content": answer},
            ]}  # fmt: skip
            file.write(json.dumps(row) + "\n")


def measure(mode: str, model: str, rows: Path, folder: Path, max_rows: int) -> dict[str, Any]:
    """Loads the rows in this process."""
    from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer
    from merit_fast.data.mixture.select import MixtureRows, ScanCache
    from merit_fast.data.store import TokenStore

    tokenizer = load_tokenizer(model)
    limit = max_rows if mode == "plain" else None
    configs = [DatasetConfig("a", str(rows), max_examples=limit)]
    data = DataConfig()
    cache = None if mode == "plain" else ScanCache(folder, lambda config, place: str(place))
    store = None if mode == "plain" else TokenStore(folder, {"a": "f"})
    memory = _Memory()
    start = time.perf_counter()
    scanned = MixtureRows(configs, data, cache)
    scanned.select("train")
    scan_s = time.perf_counter() - start
    start = time.perf_counter()
    cpu = sum(os.times()[:4])  # workers too
    with memory:
        (dataset,) = load_mixture(
            configs,
            tokenizer,
            data,
            part="train",
            rows=scanned,
            store=store,
            num_workers=0 if mode == "plain" else None,
        )
    seconds = time.perf_counter() - start
    cpu_s = sum(os.times()[:4]) - cpu
    return {
        "mode": mode,
        "rows": dataset.num_examples,
        "tokens_per_row": round(dataset.num_tokens / dataset.num_examples, 1),
        "scan_s": round(scan_s, 2),
        "load_s": round(seconds, 2),
        "rows_per_s": round(dataset.num_examples / seconds),
        "cpu_ms_per_row": round(1000 * cpu_s / dataset.num_examples, 3),
        "anonymous_mib": round(memory.anonymous / 1024),
        "resident_mib": round(memory.resident / 1024),
        "load_average": round(os.getloadavg()[0], 1),
    }


def write_large(folder: Path, count: int, tokens: int) -> None:
    """Writes a store of random examples without a tokenizer: half of each is a target."""
    import numpy as np

    from merit_fast.data.store.chunk import DTYPES, Chunk, content_check
    from merit_fast.data.store.files import FileColumns, Summary

    generator = np.random.default_rng(0)
    folder.mkdir()
    with FileColumns(folder, "<u2") as columns:
        for first in range(0, count, 10_000):
            rows = min(10_000, count - first)
            texts = generator.integers(0, 50_000, (rows, tokens))
            no_media = np.zeros(0, np.uint8)
            values = {
                "lengths": np.full(rows, tokens),
                "targets": np.full(rows, tokens // 2),
                "rows": np.arange(first, first + rows),
                "span_counts": np.ones(rows),
                "run_counts": np.zeros(rows),
                "media_counts": np.zeros(rows),
                "checks": [content_check(text, no_media) for text in texts],
                "tokens": texts.ravel(),
                "spans": np.tile([tokens - tokens // 2, tokens // 2], (rows, 1)),
                "runs": np.zeros((0, 2)),
                "media": no_media,
            }
            columns.append(Chunk({name: np.asarray(values[name], DTYPES[name]) for name in values}))
        columns.finish(Summary(num_rows=count))


def measure_large(folder: Path) -> dict[str, Any]:
    """Opens that store, counts, and reads examples in a random order."""
    import numpy as np

    from merit_fast.data.dataset import Dataset
    from merit_fast.data.store.examples import StoredExamples
    from merit_fast.data.store.files import open_columns

    memory = _Memory()
    with memory:
        start = time.perf_counter()
        columns, _ = open_columns(folder)
        dataset = Dataset("a", StoredExamples(columns))
        counts = dataset.num_examples, dataset.num_tokens, dataset.num_target_tokens
        open_s = time.perf_counter() - start
        order = np.random.default_rng(0).permutation(len(dataset.examples))[:100_000]
        start = time.process_time()
        read = sum(len(dataset.examples[int(i)].input_ids) for i in order)
        read_s = time.process_time() - start
    return {
        "mode": "large",
        "counts": counts,
        "open_s": round(open_s, 2),
        "us_per_example": round(1e6 * read_s / len(order), 1),
        "tokens_read": read,
        "anonymous_mib": round(memory.anonymous / 1024),
        "resident_mib": round(memory.resident / 1024),
    }


class _Memory:
    """Peaks of this process's memory in KiB, sampled by a thread."""

    def __init__(self) -> None:
        self.anonymous = 0
        self.resident = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            values = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
            )
            self.anonymous = max(self.anonymous, int(values["RssAnon"].split()[0]))
            self.resident = max(self.resident, int(values["VmRSS"].split()[0]))
            if self._stop.wait(0.05):
                return


def main() -> None:
    """Runs the modes, each in a process, and prints one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--words", type=int, default=240)
    parser.add_argument("--plain-rows", type=int, default=4000)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--mode")
    parser.add_argument("--large", type=int, help="examples of 300 tokens, without a tokenizer")
    arguments = parser.parse_args()
    if arguments.mode == "large":
        print(json.dumps(measure_large(arguments.work)))
        return
    if arguments.large:
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            write_large(Path(folder, "s"), arguments.large, 300)
            command = [sys.executable, "-m", "bench.data.store", "--mode", "large"]
            subprocess.run([*command, "--work", str(Path(folder, "s"))], check=True)
        return
    if arguments.mode:
        work = arguments.work
        found = measure(
            arguments.mode, arguments.model, work / "rows.jsonl", work / "s", arguments.plain_rows
        )
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        write_rows(Path(folder, "rows.jsonl"), arguments.rows, arguments.words)
        for mode in ("plain", "build", "open"):
            command = [sys.executable, "-m", "bench.data.store", "--mode", mode]
            command += ["--model", arguments.model, "--work", folder]
            command += ["--plain-rows", str(arguments.plain_rows)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
