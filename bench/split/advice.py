"""How often the advice says "split" on mixtures whose truth is known.

    OMP_NUM_THREADS=1 python -m bench.split.advice [--draws 20] [--json]

Every draw is a mixture of 6 or 12 datasets of 64 examples in 8 blocks, split in two groups by the
whole split stage. Without conflict (one common gradient, one gradient of several lengths,
orthogonal gradients, noise only) no mixture may be advised to split; planted opposites must be.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from merit_fast.data import Dataset, Example
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.manifests.sketch_state import SketchIdentity, SketchState
from merit_fast.report import advise
from merit_fast.split import SplitConfig, split_mixture

Array = npt.NDArray[np.float64]

DIMENSIONS = 300
EXAMPLES = 64
BLOCKS = 8
WIDTH = 4096
ROW = Example(np.array([1, 2], np.int32), np.array([-100, 2], np.int32))


def one_gradient(number: int, generator: np.random.Generator) -> Array:
    return np.tile(_unit(generator.standard_normal((1, DIMENSIONS))), (number, 1))


def scaled_gradient(number: int, generator: np.random.Generator) -> Array:
    lengths = np.exp(0.5 * generator.standard_normal((number, 1)))
    return np.asarray(one_gradient(number, generator) * lengths)


def orthogonal_gradients(number: int, generator: np.random.Generator) -> Array:
    return np.linalg.qr(generator.standard_normal((DIMENSIONS, number)))[0].T.copy()


def no_gradient(number: int, generator: np.random.Generator) -> Array:
    return np.zeros((number, DIMENSIONS))


def opposites(number: int, generator: np.random.Generator) -> Array:
    sides = np.where(np.arange(number) % 2, 1.0, -1.0)[:, None]
    own = _unit(generator.standard_normal((number, DIMENSIONS)))
    return np.asarray(_unit(generator.standard_normal((1, DIMENSIONS))) * sides + own)


MIXTURES: dict[str, tuple[Callable[[int, np.random.Generator], Array], float]] = {
    "one common gradient": (one_gradient, 200.0),  # name -> mean gradients, |noise|^2 per example
    "one common gradient, little noise": (one_gradient, 20.0),
    "one gradient of several lengths": (scaled_gradient, 100.0),
    "orthogonal gradients": (orthogonal_gradients, 20.0),
    "noise only": (no_gradient, 20.0),
    "planted opposites": (opposites, 60.0),
}


def draw_split(means: Array, noise: float, generator: np.random.Generator) -> SplitManifest:
    """split.json of a mixture with these mean gradients [N, D]."""
    size = EXAMPLES // BLOCKS
    noises = generator.standard_normal((len(means), BLOCKS, DIMENSIONS))
    sums = size * means[:, None] + np.sqrt(size * noise / DIMENSIONS) * noises
    identity = SketchIdentity(CountSketch(WIDTH, 0), "model", ("weight",))
    names = [f"d{i:02}" for i in range(len(means))]
    with tempfile.TemporaryDirectory() as folder:
        for name, blocks in zip(names, sums, strict=True):
            state = SketchState.zeros(identity, BLOCKS)
            state.block_sums[:, :DIMENSIONS] = torch.from_numpy(blocks)
            state.block_counts += size
            state.block_weights += size
            state.loss_sum = EXAMPLES
            state.num_target_tokens = EXAMPLES
            (Path(folder) / f"{name}.safetensors").write_bytes(state.to_bytes())
        return split_mixture(
            Path(folder),
            [Dataset(name, (ROW,) * 1000) for name in names],
            "mixture",
            SplitConfig(groups=2),
            base_fingerprint="base",
            steps=4000,
            sketched_at="at the base model",
            texts=dict,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=20, help="mixtures of each kind and size")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    for kind, (means, noise) in MIXTURES.items():
        counts[kind] = Counter()
        for number in (6, 12):
            for seed in range(arguments.draws):
                generator = np.random.default_rng([seed, number])
                split = draw_split(means(number, generator), noise, generator)
                counts[kind][advise(split).advice] += 1
    if arguments.json:
        print(json.dumps({kind: dict(count) for kind, count in counts.items()}))
        return
    for kind, count in counts.items():
        shown = ", ".join(f"{word}: {times}" for word, times in count.most_common())
        print(f"{kind:<36} {shown}")


def _unit(rows: Array) -> Array:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


if __name__ == "__main__":
    main()
