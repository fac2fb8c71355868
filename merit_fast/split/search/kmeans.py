"""Weighted kernel k-means with a limit on the groups' weight. Pure NumPy."""

import numpy as np

from merit_fast.split.search.problem import Array, Labels, Problem
from merit_fast.split.search.swap import between_groups, obey

_ROUNDS = 50


def kernel_kmeans(
    problem: Problem, capacity: float, generator: np.random.Generator, starts: int
) -> Labels:
    """Runs Lloyd's algorithm on inner products; returns the best of ``starts`` k-means++ seedings.

        distance[i, k] = <z_i, z_i> - 2 <z_i, m_k> + <m_k, m_k>

    Args:
        problem: its inner products may be indefinite.
        capacity: the largest weight of a group; inf is plain k-means. Items choose in the order of
            their loss if they miss their nearest group. They take the nearest group with room, or
            the one with most room.
        generator: for the seedings.
        starts: number of seedings.
    """
    gram = problem.products / np.outer(problem.weights, problem.weights)
    best = None
    value = -np.inf
    for _ in range(starts):
        seeds = _seed_distances(gram, problem, generator)
        labels = obey(problem, _assign(seeds, problem, capacity))
        for _ in range(_ROUNDS):
            again = obey(problem, _assign(_distances(gram, problem, labels), problem, capacity))
            if (again == labels).all():
                break
            labels = again
        reached = between_groups(problem, labels)
        if best is None or reached > value + 1e-11 * abs(value):
            best = labels
            value = reached
    assert best is not None
    return best


def _seed_distances(gram: Array, problem: Problem, generator: np.random.Generator) -> Array:
    """[M, K] distances to k-means++ seeds (Arthur & Vassilvitskii 2007).

    Seeds are drawn by weight times squared distance.
    """
    square = np.diag(gram)
    columns: list[Array] = []
    chance = problem.weights.copy()
    for _ in range(problem.num_groups):
        total = chance.sum()
        draw = generator.random()  # one per seed, whatever the distances
        odds = chance / total if total > 0 else problem.weights
        seed = min(int(np.searchsorted(np.cumsum(odds), draw * odds.sum())), len(odds) - 1)
        columns.append(square - 2 * gram[:, seed] + gram[seed, seed])
        chance = problem.weights * np.maximum(np.min(columns, axis=0), 0.0)
    return np.stack(columns, axis=1)


def _distances(gram: Array, problem: Problem, labels: Labels) -> Array:
    members = (labels[:, None] == np.arange(problem.num_groups)) * problem.weights[:, None]
    mean = members / members.sum(0)
    to_mean = gram @ mean
    return np.asarray(np.diag(gram)[:, None] - 2 * to_mean + np.einsum("ik,ik->k", mean, to_mean))


def _assign(distance: Array, problem: Problem, capacity: float) -> Labels:
    if capacity == np.inf:
        return np.asarray(distance.argmin(1))
    ranked = np.sort(distance, axis=1)
    regret = ranked[:, min(1, distance.shape[1] - 1)] - ranked[:, 0]
    labels = np.empty(len(distance), np.intp)
    weight = np.zeros(distance.shape[1])
    for item in np.argsort(-regret, kind="stable"):
        fits = weight + problem.weights[item] <= capacity
        labels[item] = (
            np.where(fits, distance[item], np.inf).argmin() if fits.any() else weight.argmin()
        )
        weight[labels[item]] += problem.weights[item]
    return labels
