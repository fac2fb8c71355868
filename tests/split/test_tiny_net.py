"""A tiny net, end to end: the split that the gradients suggest gains most, its opposite least."""

import numpy as np
import pytest
import torch
from support.partitions import balanced_halves, merge_vectors, split_blocks


class Tiny:
    """A net of 240 parameters, trained on the mean of 8 tasks that pull it apart along two axes."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shared = draw(6, 4)
        axes = draw(2, 6, 4)
        pull = torch.tensor(
            [(a, b) for a in (-1.0, 1.0) for b in (-0.6, -0.2, 0.2, 0.6)], dtype=torch.float64
        )
        self.inputs = draw(8, 64, 6)
        apart = torch.einsum("ta,tnd,ado->tno", pull, torch.tanh(self.inputs), axes)
        self.targets = torch.tanh(self.inputs @ shared) + 0.7 * apart
        self.start = torch.cat([0.5 * draw(6 * 24), 0.3 * draw(24 * 4)])
        self.start = self.train([np.zeros(8, int)], steps=150)[0, 0]

    def losses(self, weights):
        """[M, 8, 64] of every example, for M models [M, 240]."""
        first = weights[:, : 6 * 24].view(-1, 1, 6, 24)
        second = weights[:, 6 * 24 :].view(-1, 1, 24, 4)
        return ((torch.tanh(self.inputs @ first) @ second - self.targets) ** 2).mean(-1)

    def train(self, splits, steps, rate=0.05):
        """[S, K, 240] branches of S splits, each on its own tasks, all in step."""
        groups = torch.tensor(np.array(splits))
        inside = (
            (groups[:, None] == torch.arange(int(groups.max()) + 1)[:, None]).double().flatten(0, 1)
        )
        weights = self.start.repeat(len(inside), 1)
        for _ in range(steps):
            weights.requires_grad_()
            loss = (self.losses(weights).mean(2) * inside).sum(1) / inside.sum(1)
            weights = (weights - rate * torch.autograd.grad(loss.sum(), weights)[0]).detach()
        return weights.view(len(groups), -1, weights.shape[1])

    def blocks(self):
        """Block sums [8, 8, 240] of per-example gradients at the start."""
        copies = self.start.repeat(8 * 64, 1).requires_grad_()
        diagonal = self.losses(copies).view(8 * 64, 8 * 64).diagonal().sum()
        gradients = torch.autograd.grad(diagonal, copies)[0].view(8, 8, 8, -1)  # task, turn, block
        return gradients.sum(1).numpy()

    def gains(self, splits):
        """Measured gain of each split in two, its branches less their merge, the merges."""
        branches = self.train(splits, steps=20)
        middles = torch.stack(
            [torch.from_numpy(merge_vectors(pair.numpy(), [0.5, 0.5])) for pair in branches]
        )
        loss = self.losses(branches.flatten(0, 1)).mean((1, 2)).view(-1, 2).mean(1)
        return (
            (loss - self.losses(middles).mean((1, 2))).numpy(),
            branches - middles[:, None],
            middles,
        )

    def audit(self, deltas, middle):
        """Half the branches' spread in the Hessian at the merge."""
        total = 0.0
        for delta in deltas:
            _, bent = torch.autograd.functional.hvp(
                lambda w: self.losses(w[None]).mean(), middle, delta
            )
            total += float(delta @ bent) / 4
        return total


@pytest.mark.parametrize("seed", range(3))
def test_tiny_net_gains_most_by_the_found_split_and_least_by_its_opposite(seed):
    net = Tiny(seed)
    sums = net.blocks()
    counts = np.full((8, 8), 8)
    names = list("abcdefgh")
    best = split_blocks(sums, counts, names, "pca-swap")
    least = split_blocks(sums, counts, names, "anti")
    halves = [groups for groups in balanced_halves(8) if groups[0]]
    gains, deltas, middles = net.gains([best, least, *halves])
    assert gains[0] > gains[2:].mean() > gains[1]
    assert gains[0] == pytest.approx(gains[2:].max(), rel=0.1)
    assert gains[0] / net.audit(deltas[0], middles[0]) == pytest.approx(1, abs=0.1)
