"""The number of groups that ``groups: auto`` chooses on mixtures whose truth is known.

    OMP_NUM_THREADS=1 python -m bench.split.auto [--draws 20] [--noise-draws 100] [--json]

Mean gradients have the cosines of the table; every example's gradient adds Gaussian noise of square
length 20, 200 examples per dataset. The noise rows draw 7, 12, 16 or 32 datasets of 8 to 64
examples, every other one with heavy tails (Student's t of 2.5 degrees), and unequal token counts:
no gradient at all, orthogonal gradients, one common gradient.
"""

import argparse
import json
from collections import Counter

import numpy as np
import numpy.typing as npt

from merit_fast.split import SplitConfig
from merit_fast.split.decide import decide_split
from merit_fast.split.moments import block_products
from merit_fast.split.splitter import Mixture

Array = npt.NDArray[np.float64]

DIMENSIONS = 400
BLOCKS = 8


def clusters(sizes: tuple[int, ...], within: float, across: float) -> Array:
    label = np.repeat(np.arange(len(sizes)), sizes)
    cosine = np.where(label[:, None] == label, within, across)
    np.fill_diagonal(cosine, 1.0)
    return cosine


CASES: dict[str, tuple[Array, int]] = {  # name -> cosines, right K
    "3 datasets, 2 clusters, -.3": (clusters((2, 1), 0.5, -0.3), 2),
    "4 datasets, 2 clusters, -.3": (clusters((2, 2), 0.5, -0.3), 2),
    "5 datasets, 2 clusters, -.3": (clusters((3, 2), 0.5, -0.3), 2),
    "7 datasets, 2 clusters, -.3": (clusters((4, 3), 0.5, -0.3), 2),
    "12 datasets, 4 clusters, -.1": (clusters((3,) * 4, 0.5, -0.1), 4),
    "16 datasets, 2 clusters, -.3": (clusters((8, 8), 0.5, -0.3), 2),
    "32 datasets, 4 clusters, -.1": (clusters((8,) * 4, 0.5, -0.1), 4),
    "16 datasets, 2 clusters, +.1": (clusters((8, 8), 0.3, 0.1), 1),
    "32 datasets, all +.5": (clusters((32,), 0.5, 0.5), 1),
    "16 datasets, orthogonal": (np.eye(16), 1),
}
NOISES = ("no gradient", "orthogonal", "one gradient")


def draw_sums(
    cosine: Array,
    length: float,
    examples: npt.NDArray[np.int64],
    noise: float,
    heavy: bool,
    generator: np.random.Generator,
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Block sums [N, G, D] and counts [N, G] of gradients around means of these cosines."""
    values, vectors = np.linalg.eigh(cosine)
    basis = np.linalg.qr(generator.standard_normal((DIMENSIONS, len(cosine))))[0].T
    means = length * (vectors * np.sqrt(np.maximum(values, 0.0))) @ basis
    counts = examples[:, None] // BLOCKS + (np.arange(BLOCKS) < examples[:, None] % BLOCKS)
    sums = counts[:, :, None] * means[:, None]
    for i, block in np.ndindex(counts.shape):
        rows = generator.standard_normal((counts[i, block], DIMENSIONS))
        if heavy:
            rows *= generator.standard_t(2.5, (len(rows), 1)) / 5**0.5
        sums[i, block] += rows.sum(0) * np.sqrt(noise / DIMENSIONS)
    return sums, counts


def chosen(sums: Array, counts: npt.NDArray[np.int64], tokens: Array) -> int:
    names = [f"d{i:02}" for i in range(len(sums))]
    mixture = Mixture(names, tokens, tokens / 50, 100_000)
    config = SplitConfig(groups="auto")
    return decide_split(block_products(sums, counts), mixture, config).num_groups


def planted(cosine: Array, draws: int) -> Counter[int]:
    counts: Counter[int] = Counter()
    for seed in range(draws):
        generator = np.random.default_rng([seed, len(cosine)])
        examples = np.full(len(cosine), 200)
        sums = draw_sums(cosine, 1.0, examples, 20.0, False, generator)
        counts[chosen(*sums, np.full(len(cosine), 1e5))] += 1
    return counts


def of_noise(kind: str, draws: int) -> Counter[int]:
    counts: Counter[int] = Counter()
    for seed in range(draws):
        generator = np.random.default_rng([seed, 1])
        number = (7, 12, 16, 32)[seed % 4]
        cosine = np.ones((number, number)) if kind == "one gradient" else np.eye(number)
        length = 0.0 if kind == "no gradient" else 1.0
        examples = generator.integers(8, 65, number)
        sums = draw_sums(cosine, length, examples, 20.0, seed % 8 > 3, generator)
        counts[chosen(*sums, np.exp(0.8 * generator.standard_normal(number)) * 1e5)] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=20, help="mixtures of each kind")
    parser.add_argument("--noise-draws", type=int, default=100, help="mixtures of each noise")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows = {
        name: (right, planted(cosine, arguments.draws)) for name, (cosine, right) in CASES.items()
    }
    rows |= {f"noise: {kind}": (1, of_noise(kind, arguments.noise_draws)) for kind in NOISES}
    if arguments.json:
        print(json.dumps({name: {"right": k, "chosen": dict(c)} for name, (k, c) in rows.items()}))
        return
    for name, (right, counts) in rows.items():
        shown = ", ".join(f"K = {number}: {times}" for number, times in sorted(counts.items()))
        print(f"{name:<32} right: {right}   {shown}")


if __name__ == "__main__":
    main()
