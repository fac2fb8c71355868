"""Coverage-guided fuzzing of a merge's readers, run from the root with PYTHONPATH=tests.

    python -m support.merge.fuzz.checkpoint --minutes 5
    python -m support.merge.fuzz.checkpoint --minutes 5 --seed 1

The first needs `pip install atheris`; the second changes documents at random, without coverage.
Neither is part of the test suite, which has test_fuzz_checkpoint.py. An input that crashes, hangs
or disagrees with safetensors is written to the current directory;
``PYTHONPATH=tests python -m support.merge.fuzz.checkpoint FILE`` repeats it.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from support.merge.fuzz.seeds import DATA_BYTES, JUNK, KINDS, LORA, PAIR, QUANTISED, SCHEME, SEEDS
from support.merge.headers import INDEX, one_tensor, pack, write_model

from merit_fast.errors import InputError

if TYPE_CHECKING:  # a fuzzed module is imported first where it is instrumented
    from merit_fast.merge.read.entries import TensorEntry

_SCHEME_TEXT = json.dumps(SCHEME).encode()


def survives(read: Callable[[], object]) -> bool:
    """Whether ``read`` takes its input. It may only refuse it on one short line."""
    try:
        read()
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 5000, str(error)[:5000]
        return False
    return True


def check(kind: str, content: bytes, data_bytes: int, root: Path) -> None:
    """Reads ``content`` as one of KINDS, in a directory whose other files are right."""
    from merit_fast.merge.read.adapters.adapter import read_adapter
    from merit_fast.merge.read.checkpoint import read_checkpoint, read_files
    from merit_fast.merge.read.companions import check_configs, copy_companions
    from merit_fast.merge.read.decoded import read_input

    model = root / kind
    if not model.exists():
        write_model(model, {"model.safetensors": one_tensor(), "x.safetensors": one_tensor()})
        (root / "out").mkdir(exist_ok=True)
        (model / "adapter_config.json").write_text(json.dumps(LORA))
        (model / "adapter_model.safetensors").write_bytes(pack(PAIR, bytes(32)))
        if kind == "index":
            (model / "model.safetensors").unlink()
    if kind in ("header", "raw"):
        file = model / "model.safetensors"
        file.write_bytes(content if kind == "raw" else pack(content, bytes(data_bytes)))
        if survives(lambda: read_checkpoint(model)):
            agree_with_safetensors(file, read_checkpoint(model).tensors)
    elif kind == "index":
        (model / INDEX).write_bytes(content)
        survives(lambda: read_checkpoint(model))
    elif kind == "config":
        (model / "config.json").write_bytes(content)
        each = read_checkpoint(model)
        survives(lambda: check_configs([each, each]))
        survives(lambda: copy_companions(model, root / "out", ("bfloat16",), dequantized=True))
    elif kind in ("quantised", "scheme"):
        (model / "config.json").write_bytes(content if kind == "scheme" else _SCHEME_TEXT)
        header = QUANTISED if kind == "scheme" else content
        (model / "model.safetensors").write_bytes(
            pack(header, bytes(256 if kind == "scheme" else data_bytes))
        )
        survives(lambda: read_input(model, None))
    else:
        name = "adapter_model.safetensors"
        config = "adapter_config.json"
        if kind == "lora":
            (model / config).write_bytes(content)
        else:
            (model / name).write_bytes(pack(content, bytes(data_bytes)))
        if survives(lambda: read_adapter(model)):
            agree_with_safetensors(model / name, read_files(model, [name]).tensors)


def agree_with_safetensors(file: Path, tensors: Mapping[str, "TensorEntry"]) -> None:
    """Checks that the reference implementation accepts the input and sees the same tensors."""
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            theirs = {
                name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()
            }
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses what we take: {error}") from None
    assert theirs == {name: (entry.dtype, entry.shape) for name, entry in tensors.items()}


def places_of(values: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every value in a JSON document but the document itself."""
    places: list[tuple[Any, Any]] = []
    todo = [values]
    while todo:
        each = todo.pop()
        keys = (
            list(each)
            if isinstance(each, dict)
            else range(len(each))
            if isinstance(each, list)
            else []
        )
        places += [(each, key) for key in keys]
        todo += [each[key] for key in keys]
    return places


def replaced_once(seed: Any) -> Iterator[bytes]:
    """The document with each of its values, in turn, replaced by each of JUNK."""
    values = json.loads(json.dumps(seed))
    for holder, key in places_of(values):
        right = holder[key]
        for junk in JUNK:
            holder[key] = junk
            yield json.dumps(values).encode()
        holder[key] = right


def damage(text: bytes, rng: random.Random) -> bytes:
    """One structural change to a JSON text: a value replaced, removed, doubled or moved."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return text[: rng.randrange(len(text) + 1)]
    places = places_of(values)
    if not places:
        return json.dumps(rng.choice(JUNK)).encode()
    (holder, key) = rng.choice(places)
    act = rng.randrange(4)
    if act == 0:
        del holder[key]
    elif act == 1 and isinstance(holder, dict):
        holder[str(rng.choice([*JUNK, *(name for _, name in places)]))] = holder.pop(key)
    elif act == 2 and isinstance(holder, list):
        holder.insert(key, rng.choice(JUNK))
    else:
        number = holder[key] if type(holder[key]) is int else 0
        holder[key] = rng.choice([*JUNK, number + 1, number + 4, 2 * number])
    return json.dumps(values).encode()


def fuzz_at_random(root: Path, seconds: float, seed: int = 0) -> int:
    """Changes right documents at random until the time is over; returns the number of inputs.

    Raises:
        Exception: of the reader; ``root/last`` holds the input.
    """
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        kind = rng.choice([*SEEDS])
        text = json.dumps(SEEDS[kind]).encode()
        for _ in range(rng.randint(0, 6)):
            text = damage(text, rng)
        content = bytearray(text)
        for _ in range(rng.randint(0, 3) * rng.randint(0, 1)):
            at = rng.randint(0, len(content))
            content[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        num_bytes = DATA_BYTES.get(kind, 24)
        (root / "last").write_bytes(kind.encode() + b"\n" + content)
        check(kind, bytes(content), rng.choice([num_bytes, num_bytes, num_bytes, 0, 8]), root)
        count += 1
    return count


def fuzz(root: Path, seconds: float, inputs: list[str]) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["merit_fast.merge"]):
        import merit_fast.merge.read.adapters.adapter
        import merit_fast.merge.read.checkpoint
        import merit_fast.merge.read.companions  # noqa: F401

    def each(data: bytes) -> None:
        kind = KINDS[data[0] % len(KINDS)] if data else "raw"
        check(kind, data[2:], data[1] if len(data) > 1 else 0, root)
        assert set(os.listdir(root)) <= {*KINDS, "out", "corpus"}

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if len(data) < 3 or data[0] % len(KINDS) == KINDS.index("raw") or rng.random() < 0.4:
            return bytes(atheris.Mutate(data, max_size))
        return (data[:2] + damage(data[2:], rng))[:max_size]

    (root / "corpus").mkdir()
    for kind, seed in SEEDS.items():
        prefix = bytes([KINDS.index(kind), DATA_BYTES.get(kind, 24) % 256])
        (root / "corpus" / kind).write_bytes(prefix + json.dumps(seed).encode())
    (root / "corpus" / "raw").write_bytes(bytes([KINDS.index("raw"), 0]) + one_tensor())
    limits = [
        f"-max_total_time={int(seconds)}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-max_len=4096",
    ]
    work = inputs or [str(root / "corpus")]
    atheris.Setup(
        [sys.argv[0], *limits, "-print_final_stats=1", *work], each, custom_mutator=mutate
    )
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, help="change documents at random, without atheris")
    parser.add_argument("inputs", nargs="*", help="inputs found earlier, to repeat")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz") as root:
        if arguments.seed is not None:
            count = fuzz_at_random(Path(root), 60 * arguments.minutes, arguments.seed)
            print(f"{count} inputs were taken or refused in one line")
            return
        child = os.fork()
        if child == 0:
            fuzz(Path(root), 60 * arguments.minutes, arguments.inputs)
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
