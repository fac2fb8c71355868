"""Error of inner products per layout of a CountSketch, on made gradients and on real ones.

    python -m bench.sketch.layout [--draws 2000] [--real] [--model PATH]

Prints the standard deviation of <s(g), s(h)> - <g, h> over draws of the hash, divided by the bound
sqrt(|g|^2 |h|^2 + <g, h>^2) / sqrt(D); the kurtosis (3 for a normal distribution: how rare and
large the errors are); and the largest error in units of the bound. Gradients of few entries take
four times the draws. ``--real`` adds gradients of two texts by SmolLM2-135M. Accuracy, no timing.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.sketch.layouts import LAYOUTS, Block, Draw, sketch
from merit_fast.demo import default_cache, prepare_model

FEW_ENTRIES = 1 << 13  # at most so many: four times the draws
TEXTS = (
    "Question: A farmer has 17 sheep and buys 25 more at the market. He then sells 9 of them to "
    "his neighbour. How many sheep does he have now? Answer: 17 + 25 = 42, and 42 - 9 = 33.",
    "The old lighthouse stood at the end of the harbour wall. Every evening its keeper climbed the "
    "iron stairs, lit the lamp, and wrote the weather into a thick green book.",
)


@dataclass(frozen=True)
class Family:
    """Two gradients of one parameter [R, width], the width of their sketches, a name."""

    name: str
    width: int
    blocks: list[Block]
    proj_dim: int = 65536


def families() -> Iterator[Family]:
    numbers = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers)

    outliers = randn(2, 512, 512)
    outliers[:, :, [3, 100]] *= 30
    outliers[:, [5, 77]] *= 30
    yield Family("dense, 512 x 512", 512, [dense(randn(2, 512, 512))])
    rank_one = randn(2, 512, 1) * randn(2, 1, 512)
    yield Family("rank one, 512 x 512", 512, [dense(rank_one)])
    yield Family("outlier rows and columns, 512 x 512", 512, [dense(outliers)])
    yield Family("one row of 4096", 4096, [some_rows([7], randn(2, 1, 4096))])
    yield Family("one column of 4096", 4096, [some_columns([7], randn(2, 4096, 1))])
    long = some_rows([7], randn(2, 1, 16384))
    yield Family("one row of 16384, M = 64", 16384, [long], 64 * 4096)
    cross = [
        some_rows([5, 777], randn(2, 2, 2048)),
        some_columns([100, 1999], randn(2, 2048, 2)),
    ]
    yield Family("2 rows and 2 columns of 2048 x 2048", 2048, cross)


def dense(pair: Tensor) -> Block:
    """Gradients [2, R, C] as tiles; entries beyond the last row and column are zero."""
    pair = F.pad(pair, (0, -pair.shape[2] % 64, 0, -pair.shape[1] % 64))
    _, height, width = pair.shape
    down = height // 64
    across = width // 64
    lane = torch.arange(64).expand(down * across, 64)
    values = pair.view(2, down, 64, across, 64).transpose(2, 3).reshape(2, -1, 64, 64)
    top = torch.arange(down).repeat_interleave(across)
    return Block(top, torch.arange(across).repeat(down), lane, lane, values)


def some_rows(ids: Sequence[int], rows: Tensor) -> Block:
    """Rows ``ids`` [2, N, C] of two gradients."""
    rows = F.pad(rows, (0, -rows.shape[2] % 64))
    row = torch.tensor(ids).repeat_interleave(rows.shape[2] // 64)
    lane = torch.arange(64).expand(len(row), 64)
    left = torch.arange(rows.shape[2] // 64).repeat(len(ids))
    return Block(row // 64, left, row.unsqueeze(1) % 64, lane, rows.reshape(2, len(row), 1, 64))


def some_columns(ids: Sequence[int], columns: Tensor) -> Block:
    """Columns ``ids`` [2, R, N] of two gradients."""
    turned = some_rows(ids, columns.transpose(1, 2))
    values = turned.values.transpose(2, 3)
    return Block(turned.left, turned.top, turned.columns, turned.rows, values)


def real_families(model_path: Path) -> Iterator[Family]:
    """Gradients of the mean loss of two texts: rows of the embedding, linear weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    layer = model.model.layers[min(3, len(model.model.layers) - 1)]
    weights = {
        "k_proj": layer.self_attn.k_proj.weight,
        "o_proj": layer.self_attn.o_proj.weight,
    }
    lookups: list[Tensor] = []
    ids: list[Tensor] = []
    gradients: list[tuple[Tensor, ...]] = []
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt").input_ids
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, labels=tokens).loss
        lookup, *of_weights = torch.autograd.grad(loss, [embedded, *weights.values()])
        ids.append(tokens[0])
        lookups.append(lookup[0])
        gradients.append(tuple(of_weights))
    looked = looked_up(ids, lookups)
    yield Family("SmolLM2: rows of the embedding", lookups[0].shape[1], [looked])
    for name, first, second in zip(weights, *gradients, strict=True):
        pair = torch.stack([first, second])
        shape = " x ".join(map(str, first.shape))
        yield Family(f"SmolLM2: {name} [{shape}]", first.shape[-1], [dense(pair)])


def looked_up(ids: list[Tensor], lookups: list[Tensor]) -> Block:
    """Rows of an embedding's gradient; two texts share some of their tokens."""
    rows = torch.tensor(sorted({token for tokens in ids for token in tokens.tolist()}))
    pair = torch.zeros(2, len(rows), lookups[0].shape[1])
    for gradient, tokens, values in zip(pair, ids, lookups, strict=True):
        gradient.index_add_(0, torch.searchsorted(rows, tokens), values)
    return some_rows(rows.tolist(), pair)


def num_entries(family: Family) -> int:
    return sum(block.values[0].numel() for block in family.blocks)


def errors(family: Family, draw: Draw, draws: int) -> Tensor:
    """[draws] float64 errors of the inner product, in units of the bound."""
    g, h = torch.cat([block.values.flatten(1) for block in family.blocks], 1).double()
    truth = (g * h).sum()
    squares = g.square().sum() * h.square().sum() + truth.square()
    bound = (squares / family.proj_dim).sqrt()
    products: list[Tensor] = []
    for seed in range(draws):
        sketches = torch.zeros(2, family.proj_dim)
        for block in family.blocks:
            sketches += sketch(block, family.width, seed, family.proj_dim, draw)
        a, b = sketches.double()
        products.append((a * b).sum())
    relative: Tensor = (torch.stack(products) - truth) / bound
    return relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--real", action="store_true", help="gradients of SmolLM2-135M too")
    parser.add_argument("--model", type=Path, help="a model directory in place of SmolLM2-135M")
    arguments = parser.parse_args()
    print("std / bound, kurtosis, largest error / bound\n")
    print("| gradients | draws |", " | ".join(LAYOUTS), "|")
    print("|---" * (len(LAYOUTS) + 2) + "|")
    cases = list(families())
    if arguments.real or arguments.model:
        cases += real_families(arguments.model or prepare_model(default_cache()))
    for family in cases:
        few = num_entries(family) <= FEW_ENTRIES
        draws = 4 * arguments.draws if few else arguments.draws
        cells = []
        for draw in LAYOUTS.values():
            e = errors(family, draw, draws)
            kurtosis = (e - e.mean()).pow(4).mean() / e.var().square()
            cells.append(f"{e.std():.2f}, {kurtosis:.1f}, {e.abs().max():.1f}")
        print(f"| {family.name} | {draws} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
