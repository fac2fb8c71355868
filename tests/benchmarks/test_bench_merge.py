"""The merge benchmark keeps running: rounds, resume, refusal, the tables, and the arithmetic it judges bits by."""

import json
import subprocess
import sys
from fractions import Fraction

import pytest
from support.paths import ROOT

LIGHT = ["--size", "tiny", "--no-mergekit", "--skip", "transformers,safetensors,memory"]


def run(*arguments, code=0):
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == code, process.stdout + process.stderr
    return process.stdout + process.stderr


def bench(folder, *arguments, code=0):
    return run("-m", "bench.merge.commands", folder, *LIGHT, *arguments, code=code)


@pytest.mark.process
def test_a_round_is_measured_kept_and_not_repeated(tmp_path):
    text = bench(tmp_path, "--only", "linear,cold", "--rounds", "1")
    assert "round 1, linear: command: " in text and "failed" not in text
    assert "| warm and fsynced, library call against the write floor | " in text
    lines = (tmp_path / "bench_merge-tiny.jsonl").read_text().splitlines()
    rows = json.loads(lines[1])["round"]["rows"]
    assert rows["library"]["inner_wall_s"] < rows["library"]["wall_s"]
    assert rows["command"]["cached_before"] in (1.0, None)
    assert json.loads(lines[2])["round"]["group"] == "cold"

    (tmp_path / "bench_merge-tiny.jsonl").write_text("\n".join([*lines, '{"round": {"gro']))
    again = bench(
        tmp_path,
        "--only",
        "linear",
        "--rounds",
        "2",
        "--skip",
        "transformers,safetensors,memory,library",
    )
    assert "round 1, linear" not in again and "round 2, linear: command-fsync: " in again
    assert not list((tmp_path / "scratch-tiny").glob("out*"))


@pytest.mark.process
def test_results_of_other_circumstances_are_refused(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"size": "0.5b"}\n')
    text = bench(tmp_path, "--only", "startup", "--rounds", "1", "--json", file, code=1)
    assert f"{file}: was measured with another " in text and "size" in text
    assert file.read_text() == '{"size": "0.5b"}\n'


def test_a_child_is_not_charged_with_the_memory_of_the_process_that_starts_it():
    text = "import bench.support.measure as m; held = bytearray(1 << 28); print(m.run_child(['/bin/true'])['peak_mib'])"
    assert float(run("-c", text)) < 64


def test_a_failing_child_gives_its_last_words():
    text = "import sys, bench.support.measure as m; print(m.run_child([sys.executable, '-c', 'raise SystemExit(\"no disk\")']))"
    assert run("-c", text).strip() == "{'error': 'no disk'}"


@pytest.fixture(scope="module")
def round_once():
    sys.path.insert(0, str(ROOT))
    try:
        from bench.merge.bits import round_once
    finally:
        sys.path.remove(str(ROOT))
    return round_once


# between the bf16 values 1 and 1 + 1/128 the middle is 1 + 1/256; 2**-40 beside it is lost in fp32
@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1 + 2**-8, 0x3F80),
        (1 + 2**-8 + 2**-40, 0x3F81),
        (1 + 2**-7 + 2**-8 - 2**-40, 0x3F81),
        (-(1 + 2**-8 + 2**-40), 0xBF81),
        (2**-134 + 2**-150, 0x0001),
        (-0.0, 0x8000),
    ],
)
def test_the_reference_rounds_once(round_once, value, bits):
    import numpy as np

    assert round_once(np.array([value]))[0] == bits
    exact = Fraction(value)
    result = np.array([bits << 16], np.uint32).view(np.float32)[0]
    for neighbour in np.array([(bits + 1) << 16, (bits - 1) % 65536 << 16], np.uint32).view(
        np.float32
    ):
        if np.isfinite(neighbour):
            assert abs(Fraction(float(result)) - exact) <= abs(Fraction(float(neighbour)) - exact)


@pytest.mark.process
def test_io_paths_measures_every_way(tmp_path):
    text = run("-m", "bench.merge.io_paths", tmp_path, "--mib", "8", "--rounds", "1")
    assert all(
        f"| {way} " in text
        for way in ("O_DIRECT, 1 MiB", "copy_file_range", "mmap, copied in 512 KiB")
    )
    assert not list(tmp_path.iterdir())
