"""Error of inner products per layout of a CountSketch, on gradients made to break it.

    python -m bench.sketch.layout [--proj-dim 16384] [--seeds 2000]

Prints the standard deviation of <s(g), s(h)> - <g, h> over seeds, divided by the bound sqrt(|g|^2
|h|^2 + <g, h>^2) / sqrt(D), and the kurtosis (3 for a normal distribution: how rare and large the
errors are). Accuracy, no timing.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from merit_fast.kernels.sketch import CountSketch, flat_sketch
from merit_fast.kernels.sketch._eager import bucket_of, hash_counters, hash_key

ROWS = 512
COLUMNS = 768


def gradients(numbers: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers)

    yield "dense", randn(2, ROWS, COLUMNS)
    yield "rank one", randn(2, ROWS, 1) * randn(2, 1, COLUMNS)
    column = torch.zeros(2, ROWS, COLUMNS)
    row = torch.zeros(2, ROWS, COLUMNS)
    outliers = randn(2, ROWS, COLUMNS)
    column[:, :, 5] = randn(2, ROWS)
    row[:, 7] = randn(2, COLUMNS)
    yield "one column", column
    yield "one row", row
    outliers[:, :, [3, 100]] *= 30
    yield "outlier columns", outliers.clone()
    outliers[:, [5, 77]] *= 30
    yield "outlier columns and rows", outliers


def runs_of_16(pair: Tensor, key: int, proj_dim: int) -> Tensor:
    """Sketches by hash version 1: runs of 16 columns, each in a row of 16, XORed and signed."""
    values = F.pad(pair, (0, -COLUMNS % 16)).reshape(2, -1, 16)
    h = hash_counters(torch.arange(values.shape[1]), key).unsqueeze(1)
    lane = torch.arange(16)
    lane = lane ^ h >> 16 & 15
    at = ((h >> 32 & 0xFFFFFFFF) * (proj_dim // 16) >> 32) * 16 + lane
    values = values * (1.0 - 2.0 * (h >> lane & 1))
    return torch.zeros(2, proj_dim).index_add_(1, at.flatten(), values.flatten(1))


def tiles(pair: Tensor, key: int, proj_dim: int, side: int, dealt: bool) -> Tensor:
    """Sketches square tiles.

    dealt: of D / side^2 tiles in a row no two share a bucket. Else each tile draws its bucket.
    """
    across = COLUMNS // side
    buckets = proj_dim // side**2
    values = (
        pair.view(2, ROWS // side, side, across, side).transpose(2, 3).reshape(2, -1, side, side)
    )
    tile = torch.arange(values.shape[1])
    lane = torch.arange(side)
    masks = hash_counters(4 * tile, key)
    drawn = (masks >> 32 & 0xFFFFFFFF) * buckets >> 32
    bucket = bucket_of(tile, key, buckets) if dealt else drawn
    row = lane ^ (masks & side - 1).unsqueeze(1)
    column = lane ^ (masks >> 8 & side - 1).unsqueeze(1)
    at = ((bucket * side).unsqueeze(1) + row).unsqueeze(2) * side + column.unsqueeze(1)
    signs = [
        1.0 - 2.0 * (hash_counters(4 * tile + k, key).unsqueeze(1) >> lane & 1) for k in (1, 2)
    ]
    values = values * (signs[0].unsqueeze(2) * signs[1].unsqueeze(1))
    return torch.zeros(2, proj_dim).index_add_(1, at.flatten(), values.flatten(1))


LAYOUTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "runs of 16": lambda pair, seed, width: runs_of_16(pair, hash_key(seed, "w"), width),
    "tiles of 32, dealt": lambda pair, seed, width: tiles(
        pair, hash_key(seed, "w"), width, 32, True
    ),
    "tiles of 64": lambda pair, seed, width: tiles(pair, hash_key(seed, "w"), width, 64, False),
    "tiles of 64, dealt (ours)": lambda pair, seed, width: flat_sketch(
        pair, "w", CountSketch(width, seed)
    ),
}


def errors(pair: Tensor, layout: str, proj_dim: int, seeds: int) -> Tensor:
    """[seeds] float64 errors of the inner product, in units of the bound."""
    g, h = pair.double()
    truth = (g * h).sum()
    bound = ((g.square().sum() * h.square().sum() + truth.square()) / proj_dim).sqrt()
    products: list[Tensor] = []
    for seed in range(seeds):
        a, b = LAYOUTS[layout](pair, seed, proj_dim).double()
        products.append((a * b).sum())
    relative: Tensor = (torch.stack(products) - truth) / bound
    return relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--proj-dim", type=int, default=16384)
    parser.add_argument("--seeds", type=int, default=2000)
    arguments = parser.parse_args()
    print(
        f"{ROWS} x {COLUMNS}, D = {arguments.proj_dim}, {arguments.seeds} seeds: "
        "std / bound (kurtosis)\n"
    )
    print("| gradients |", " | ".join(LAYOUTS), "|")
    print("|---" * (len(LAYOUTS) + 1) + "|")
    for family, pair in gradients(torch.Generator().manual_seed(1)):
        cells = []
        for layout in LAYOUTS:
            e = errors(pair, layout, arguments.proj_dim, arguments.seeds)
            kurtosis = (e - e.mean()).pow(4).mean() / e.var().square()
            cells.append(f"{e.std():.2f} ({kurtosis:.1f})")
        print(f"| {family} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
