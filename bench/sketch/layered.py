"""Sketch of a model layer by layer: peak memory, and time next to its reads and its products.

    python -m bench.sketch.layered DIR [--size 14b|1b|mini] [--rows 1] [--tokens 64] [--random 10]

Makes a bf16 checkpoint of a Qwen2 shape in DIR (14b: 29.5 GB). Embeddings, head and ``--random``
layers are on the disk. The other layers are holes of sparse files; the system delivers their zeros
through the page cache as it does bytes of the disk. Prints one line of JSON:

    reads      every file from the first to the last and back, by read() from a cold cache
    products   a step of the same model with 1 and 2 layers in memory: rest + layers * (the
               difference, and a layer's forward pass once more)
    ratio      (one batch, from a cold cache) / (reads + products), in wall and in CPU seconds

With ``1b`` and ``mini`` it also compares the bytes with those of the whole model in memory.
"""

import argparse
import json
import os
import statistics
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import merit_fast
from merit_fast.model import load_model, peak_memory_bytes, reset_peak_memory
from merit_fast.sketch.gradients import GradientSketcher

SIZES: dict[str, dict[str, int]] = {
    "14b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, vocab_size=152064),
    "1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, vocab_size=32000),
    "mini": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=1000),
}
HEAD = 128
BLOCK = 1 << 24
ROUNDS = 3


def config_of(size: str, layers: int | None = None) -> Any:
    from transformers import Qwen2Config

    sizes: dict[str, Any] = dict(SIZES[size])
    heads = sizes["hidden_size"] // HEAD
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    return Qwen2Config(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=heads // (5 if heads % 5 == 0 else 2),
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    )


def write_checkpoint(folder: Path, config: Any, random_layers: int) -> None:
    """Writes one file for each layer and one for the rest."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    files: dict[str, dict[str, Tensor]] = {}
    for name, value in model.state_dict().items():
        number = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"layer-{number}.safetensors", {})[name] = value
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(BLOCK, generator=generator).mul_(0.02).bfloat16().view(torch.uint8)
    for i, (file, tensors) in enumerate(files.items()):
        is_random = i <= random_layers  # file 0 is the rest
        _write(folder / file, tensors, pool if is_random else None)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, part in files.items() for name in part},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def _write(file: Path, tensors: dict[str, Tensor], pool: Tensor | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(value.shape),
            "data_offsets": [end, end + value.nbytes],
        }
        end += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)
    ones = torch.ones(1 << 16, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        start = out.tell()
        for name, value in tensors.items():
            begin, stop = header[name]["data_offsets"]
            out.seek(start + begin)
            if value.dim() == 1:
                out.write(ones[: stop - begin] if "norm" in name else bytes(stop - begin))
            elif pool is not None:
                whole = pool.numpy().tobytes()
                for at in range(begin, stop, len(whole)):
                    out.write(whole[: stop - at])
        out.truncate(start + end)
        out.flush()
        os.fsync(out.fileno())


def forget(folder: Path) -> None:
    """Takes a checkpoint's files out of the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_twice(folder: Path) -> None:
    """Reads the layers' files in their order and back, and the rest's once."""
    layers = sorted(folder.glob("layer-[0-9]*"), key=lambda f: int(f.stem.split("-")[1]))
    buffer = bytearray(BLOCK)
    for file in (folder / "layer-rest.safetensors", *layers, *reversed(layers[:-1])):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall = time.perf_counter()
    cpu = time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def step(model: nn.Module, ids: Tensor) -> dict[str, bytes]:
    """Sketches one batch; returns the bytes of its state."""
    with GradientSketcher(
        model, merit_fast.kernels.sketch.CountSketch(65536), check="never", fingerprint="bench"
    ) as sketcher:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        losses.backward()  # type: ignore[no-untyped-call]
        sketcher.update(["bench"] * len(ids))
    return {str(name): state.to_bytes() for name, state in sketcher.state.items()}


def measure(
    folder: Path, ids: Tensor, rounds: int
) -> tuple[dict[str, bytes], list[tuple[float, float]], list[tuple[float, float]]]:
    """A batch's states, and (wall, CPU) seconds of the reads and of the batches, by rounds."""
    reset_peak_memory()
    model = merit_fast.load_layered(folder, "bf16")
    step(model, ids[:, :8])  # imports and allocations
    states: dict[str, bytes] = {}
    reads = []
    batches = []
    for _ in range(rounds):
        forget(folder)
        reads.append(seconds(lambda: read_twice(folder)))
        forget(folder)
        batches.append(seconds(lambda: states.update(step(model, ids))))
    return states, reads, batches


def products(size: str, ids: Tensor, layers: int) -> list[tuple[float, float]]:
    """(wall, CPU) seconds of a batch's products, by rounds."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    models = []
    for number in (1, 2):
        model = auto.from_config(config_of(size, number), dtype=torch.bfloat16)
        models.append(model.eval())
    layer = models[1].model.layers[1]
    states = torch.randn(*ids.shape, layer.hidden_size).bfloat16()
    places = torch.arange(ids.shape[1])[None]
    rotary = models[1].model.rotary_emb(states, places)

    def forward() -> None:
        with torch.no_grad():
            layer(states, position_embeddings=rotary, attention_mask=None)

    for model in models:
        step(model, ids)
    found = []
    for _ in range(ROUNDS):
        one = seconds(lambda: step(models[0], ids))
        two = seconds(lambda: step(models[1], ids))
        once = seconds(forward)
        wall, cpu = (
            a + (layers - 1) * (b - a) + layers * c for a, b, c in zip(one, two, once, strict=True)
        )
        found.append((wall, cpu))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="14b")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--random", type=int, default=10, help="layers that are no holes")
    arguments = parser.parse_args()
    config = config_of(arguments.size)
    folder = arguments.folder / arguments.size
    if not (folder / "config.json").exists():
        write_checkpoint(folder, config, arguments.random)
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.rows, arguments.tokens)
    ids = torch.randint(3, config.vocab_size, shape, generator=generator)
    results: dict[str, Any] = vars(arguments) | {"folder": None, "threads": torch.get_num_threads()}
    results["bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    states, reads, batches = measure(folder, ids, 1 if arguments.size == "14b" else ROUNDS)
    results["peak_gib"] = round(peak_memory_bytes() / 2**30, 2)
    parts = products(arguments.size, ids, config.num_hidden_layers)
    for i, kind in enumerate(("wall", "cpu")):
        batch, read, product = (
            statistics.median(one[i] for one in rounds) for rounds in (batches, reads, parts)
        )
        results[kind] = {
            "batch": round(batch, 2),
            "reads": round(read, 2),
            "products": round(product, 2),
            "ratio": round(batch / (read + product), 2),
        }
    if arguments.size != "14b":
        whole = step(load_model(str(folder), "bf16"), ids)
        results["equal_bytes"] = whole == states
    print(json.dumps(results))


if __name__ == "__main__":
    main()
