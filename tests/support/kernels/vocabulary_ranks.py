"""Two ranks over gloo that hold a head's rows; each compares its results with one process's.

python -m support.kernels.vocabulary_ranks FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.kernels.loss_cases import Batch, batch, packed
from support.merge.dcp.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from merit_fast.kernels.cross_entropy import (
    VocabularyShard,
    linear_cross_entropy,
    linear_token_statistics,
)

WORDS = 1003
BF16 = torch.bfloat16
SPLITS = (700, WORDS, 0)  # rows of rank 0; the others are rank 1's
TERMS: dict[str, Any] = dict(bias=True, softcap=3.0, label_smoothing=0.1, z_loss=1e-2)


def shard_of(rank: int, split: int) -> tuple[slice, VocabularyShard]:
    rows = slice(0, split) if rank == 0 else slice(split, WORDS)
    group: Any = dist.group.WORLD
    return rows, VocabularyShard(group, rows.start, WORDS)


def leaves_of(of: Batch, rows: slice) -> dict[str, Any]:
    tensors = {"hidden": of.hidden, "weight": of.weight[rows]}
    if of.bias is not None:
        tensors["bias"] = of.bias[rows]
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


def loss_results(of: Batch, rows: slice, vocabulary: VocabularyShard | None) -> list[Any]:
    leaves = leaves_of(of, rows)
    result = linear_cross_entropy(labels=of.labels, vocabulary=vocabulary, **leaves, **of.options)
    objective: Any = result.loss + result.example_loss.sum() + 2 * result.dataset_loss.sum()
    objective.backward()
    return [*result, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def statistics_results(of: Batch, rows: slice, vocabulary: VocabularyShard | None) -> list[Any]:
    leaves = leaves_of(of, rows)
    found = linear_token_statistics(
        labels=of.labels, entropy=True, top1=True, vocabulary=vocabulary, temperature=1.5,
        scale=0.5, **leaves,
    )  # fmt: skip
    assert found.entropy is not None and found.is_top1 is not None and found.is_top1.any()
    (found.log_probs * found.entropy).sum().backward()  # type: ignore[no-untyped-call]
    return [*found, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def check_one_process_s_results(rank: int) -> None:
    """All results, the gradient of hidden, and those of this rank's rows."""
    tolerances: dict[Any, dict[str, Any]] = {torch.float32: {}, BF16: dict(rtol=2e-2, atol=2e-2)}
    for dtype, tolerance in tolerances.items():
        torch.manual_seed(0)
        of = packed(dtype=dtype, **TERMS)
        plain = batch(dtype=dtype, bias=True)
        assert plain.bias is not None
        logits = plain.hidden.float() @ plain.weight.float().T + plain.bias.float()
        best = logits.argmax(-1)
        plain.labels[::3] = best[::3]
        for split in SPLITS:
            rows, shard = shard_of(rank, split)
            for results_of, case in ((loss_results, of), (statistics_results, plain)):
                whole = results_of(case, slice(0, WORDS), None)
                for k in (-2, -1):  # of weight and bias
                    whole[k] = whole[k][rows]
                for ours, expected in zip(results_of(case, rows, shard), whole, strict=True):
                    torch.testing.assert_close(ours, expected, **tolerance)


def check_refusals(rank: int) -> None:
    of = batch()
    rows, shard = shard_of(rank, 700)
    weight = of.weight[rows]
    labels = of.labels.roll(rank)
    with pytest.raises(ValueError, match="labels must be equal in every process"):
        linear_cross_entropy(of.hidden, weight, labels, vocabulary=shard)
    for function in (linear_cross_entropy, linear_token_statistics):
        wrong = of.labels.clone()
        wrong[0] = 5 * WORDS if rank else 0  # no word, in one process: the other one must not wait
        with pytest.raises(ValueError, match="labels must be equal in every process"):
            function(of.hidden, weight, wrong, vocabulary=shard)
    close = of.labels.clone()
    close[:2] = torch.tensor([3, 0] if rank else [0, 1])  # of equal sums, also weighted by 1, 3
    with pytest.raises(ValueError, match="labels must be equal in every process"):
        linear_cross_entropy(of.hidden, weight, close, vocabulary=shard)
    shifted = VocabularyShard(shard.group, 1 if rank else 0, WORDS)
    with pytest.raises(ValueError, match="rows of the processes must follow one another"):
        linear_token_statistics(of.hidden, weight, of.labels, vocabulary=shifted)
    larger = VocabularyShard(shard.group, shard.first_row, WORDS + 1)
    with pytest.raises(ValueError, match="num_rows must be the 1003 rows of all, got 1004"):
        linear_cross_entropy(of.hidden, weight, of.labels, vocabulary=larger)
    sharded = distribute_tensor(of.weight, init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(ValueError, match="weight must be a plain tensor, got a DTensor"):
        linear_cross_entropy(of.hidden, sharded, of.labels)


class Model(nn.Module):
    """A layer and a tied head, whose loss comes from the head's parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.embedding = nn.Embedding(300, 16)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.layer(self.embedding(ids))
        return linear_cross_entropy(hidden, self.embedding.weight, labels).loss


def check_fsdp2(rank: int) -> None:
    """Parameters that are DTensors outside the forward pass and plain inside."""
    torch.manual_seed(1)
    model = Model()
    whole = Model()
    whole.load_state_dict(model.state_dict())
    ids = torch.randint(0, 300, (2, 3, 9))
    fully_shard(model.layer)
    fully_shard(model)
    model(ids[rank], ids[rank].roll(-1, 1)).backward()
    losses = [whole(one, one.roll(-1, 1)) for one in ids]
    torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
    for ours, expected in zip(model.parameters(), whole.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor)
        torch.testing.assert_close(ours.grad.full_tensor(), expected.grad)


def work(rank: int, folder: Path) -> None:
    for check in (check_one_process_s_results, check_refusals, check_fsdp2):
        check(rank)
        print(check.__name__, flush=True)


if __name__ == "__main__":
    run_ranks(2, work, Path(sys.argv[1]) / "meeting")
