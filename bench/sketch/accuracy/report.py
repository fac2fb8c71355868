"""Tables of the errors of cosines."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.support.measure import Results


def cosines(products: Tensor) -> Tensor:
    norms = products.diagonal().sqrt()
    return products / norms / norms.unsqueeze(1)


def report(results: Results, proj_dims: Sequence[int]) -> str:
    """Tables of the cosines' errors over all pairs and seeds, in units of 1/sqrt(D)."""
    exact = sum(
        torch.tensor(value, dtype=torch.float64) for value in results.of("exact")[0].values()
    )
    assert isinstance(exact, Tensor)
    truth = cosines(exact)
    rows, columns = torch.triu_indices(len(truth), len(truth), offset=1)
    c = truth[rows, columns]
    lines = [
        f"{len(exact)} tasks, {len(c)} pairs; "
        f"exact cosines {c.min():.3f} to {c.max():.3f}, mean {c.mean():.3f}.",
        "",
        "| D | seeds | rms error (each seed) | <= 2.5 | worst pair | rms / theory | "
        "inner products: rms / theory |",
        "|---|---|---|---|---|---|---|",
    ]
    goals = ["", "| goal | measured | must | |", "|---|---|---|---|"]
    for proj_dim in proj_dims:
        entries = [entry for entry in results.of("sketch") if entry["proj_dim"] == proj_dim]
        # [seeds, N, N]
        products = torch.tensor([entry["products"] for entry in entries], dtype=torch.float64)
        sketched = torch.stack([cosines(of_seed) for of_seed in products])
        error = proj_dim**0.5 * (sketched[:, rows, columns] - c)
        norms = exact.diagonal().sqrt()
        relative = (products - exact) / norms / norms.unsqueeze(1)
        inner = proj_dim**0.5 * relative[:, rows, columns]
        each = error.square().mean(1).sqrt()
        rms = float(error.square().mean().sqrt())
        within = float((error.abs() <= 2.5).double().mean())
        worst = float(error.abs().max())
        # To first order in the norms' errors.
        by_theory = float((error / (1 - c**2)).square().mean().sqrt())
        inner_by_theory = float((inner / (1 + c**2).sqrt()).square().mean().sqrt())
        lines.append(
            f"| {proj_dim} | {len(error)} | {rms:.3f} ({each.min():.2f}–{each.max():.2f}) | "
            f"{within:.1%} | {worst:.2f} | {by_theory:.3f} | {inner_by_theory:.3f} |"
        )
        goals += [_goal(f"rms error, D = {proj_dim}", rms, "<= 1.1", rms <= 1.1)]
        quantile = float(error.abs().quantile(0.95))
        goals += [_goal(f"95 % quantile, D = {proj_dim}", quantile, "<= 2.5", within >= 0.95)]
    strided = _strided(results, truth, len(exact))
    return "\n".join([*lines, *goals, "", *strided, "", *_shares(results.of("exact")[0], exact)])


def _strided(results: Results, truth: Tensor, number: int) -> list[str]:
    """Lines of the cosines' errors from every fifth entry, next to those of the sketches."""
    rows, columns = torch.triu_indices(number, number, offset=1)
    kept: dict[tuple[str, int], Tensor] = {}
    for entry in results.of("strided"):
        kept[f"every fifth entry, from {entry['offset']} on", entry["floats"]] = _error(
            entry, truth
        )
    for proj_dim in sorted({entry["proj_dim"] for entry in results.of("sketch")}):
        entries = [entry for entry in results.of("sketch") if entry["proj_dim"] == proj_dim]
        errors = [_error(entry, truth) for entry in entries]
        kept[f"sketch, {len(entries)} seeds", proj_dim] = torch.stack(errors)
    lines = [
        "| kept of a gradient | floats | rms error of a cosine | largest |",
        "|---|---|---|---|",
    ]
    for (name, floats), error in kept.items():
        off = error[..., rows, columns]
        rms = float(off.square().mean().sqrt())
        lines.append(f"| {name} | {floats:,} | {rms:.4f} | {float(off.abs().max()):.4f} |")
    return lines


def _error(entry: dict[str, Any], truth: Tensor) -> Tensor:
    return cosines(torch.tensor(entry["products"], dtype=torch.float64)) - truth


def _goal(name: str, value: float, must: str, reached: bool) -> str:
    return f"| {name} | {value:.3f} / sqrt(D) | {must} | {'reached' if reached else '**missed**'} |"


def _shares(products: dict[str, Any], exact: Tensor) -> list[str]:
    """Lines of the ten parameters with the largest share of the squared norm, mean over tasks."""
    shares = {
        name: float((torch.tensor(value).diagonal() / exact.diagonal()).mean())
        for name, value in products.items()
    }
    largest = sorted(shares.items(), key=lambda item: -item[1])[:10]
    return [
        "| parameter | share of the squared norm |",
        "|---|---|",
        *(f"| {n} | {share:.3f} |" for n, share in largest),
    ]
