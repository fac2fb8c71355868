"""One optimizer step of a branch."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from merit_fast.data import Batch
from merit_fast.errors import MeritFastError
from merit_fast.train.config import TrainConfig
from merit_fast.train.loss import batch_loss
from merit_fast.train.metrics.record import DatasetSums, StepRecord
from merit_fast.train.optimizer import MasterAdamW, NonFiniteGradient
from merit_fast.train.prepare import TrainedModel
from merit_fast.train.resume import Position
from merit_fast.train.schedule import learning_rate

_ADVICE = "lower train.learning_rate or look at these rows; the last checkpoint is kept"


def train_step(
    trained: TrainedModel,
    optimizer: MasterAdamW,
    batches: Sequence[Batch],
    names: Sequence[str],
    steps: int,
    config: TrainConfig,
    position: Position,
) -> tuple[Position, StepRecord]:
    """Takes one step; its random state depends only on the seed and the number of the step.

    Args:
        trained: the model.
        optimizer: of its trained parameters.
        batches: the step's micro-batches.
        names: of the branch's datasets, which the batches number.
        steps: of the whole run.
        config: the recipe.
        position: steps done so far.

    Raises:
        MeritFastError: the loss or the gradient is not finite; the message names the datasets.
    """
    start = time.perf_counter()
    torch.manual_seed(config.seed * 1_000_003 + position.step)  # dropout, where a model has it
    sums = _backward(trained, batches, len(names))
    where = f"at step {position.step}"
    not_finite = [
        name for name, loss in zip(names, sums.losses, strict=True) if not abs(loss) < float("inf")
    ]
    if not_finite:
        raise MeritFastError(
            f"train: loss is not finite {where} in dataset {', '.join(not_finite)}; {_ADVICE}"
        )
    rate = learning_rate(position.step, steps, config)
    try:
        norm = optimizer.step(rate)
    except NonFiniteGradient as error:
        seen = ", ".join(name for name, count in zip(names, sums.tokens, strict=True) if count)
        what = f"the gradient of {error.parameter}" if error.parameter else "the gradient's norm"
        raise MeritFastError(
            f"train: {what} is not finite {where} with rows of dataset {seen}; {_ADVICE}"
        ) from None
    num_tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    moved = replace(
        position,
        step=position.step + 1,
        num_tokens=position.num_tokens + num_tokens,
        num_target_tokens=position.num_target_tokens + sums.num_tokens,
        losses=(*position.losses, sums.mean),
    )
    seconds = time.perf_counter() - start
    return moved, StepRecord(moved.step, sums, num_tokens, rate, norm, seconds)


def _backward(trained: TrainedModel, batches: Sequence[Batch], num_datasets: int) -> DatasetSums:
    """Adds the gradients of the mean loss over the whole step's target tokens."""
    targets = sum(batch.num_target_tokens for batch in batches)
    all_tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    losses = torch.zeros(num_datasets, dtype=torch.float64)
    tokens = torch.zeros(num_datasets, dtype=torch.int64)
    for batch in batches:
        # a router's loss is a mean over tokens: a micro-batch counts by its share of them
        share = int(batch.attention_mask.sum()) / all_tokens
        factor = trained.router_factor * share
        loss = batch_loss(trained.model, batch, targets, num_datasets, factor)
        loss.loss.backward()  # type: ignore[no-untyped-call]
        losses += loss.dataset_losses
        tokens += loss.dataset_tokens
    return DatasetSums(tuple(losses.tolist()), tuple(tokens.tolist()))
