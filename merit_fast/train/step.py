"""One optimizer step of a branch."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from merit_fast.data import IGNORED_LABEL, Batch, PackedBatch
from merit_fast.errors import MeritFastError
from merit_fast.train.config import TrainConfig
from merit_fast.train.loss import batch_loss
from merit_fast.train.metrics.record import DatasetSums, StepRecord
from merit_fast.train.optimizer import MasterAdamW, NonFiniteGradient
from merit_fast.train.parallel.pieces import is_divided
from merit_fast.train.parallel.ranks import ONE_PROCESS, Ranks
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
    ranks: Ranks = ONE_PROCESS,
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
        ranks: the processes that share the batches; each has all of them.

    Raises:
        MeritFastError: the loss or the gradient is not finite; the message names the datasets.
    """
    start = time.perf_counter()
    seed = config.seed * 1_000_003 + position.step
    torch.manual_seed(seed + ranks.rank * 2**40)  # dropout, where a model has it
    rate = learning_rate(position.step, steps, config)
    sums = _backward(trained, optimizer, batches, len(names), rate, ranks)
    ranks.add_gradients([p for p in optimizer.parameters if not is_divided(p)])
    if optimizer.is_divided:
        _drop_unused(trained, optimizer, config)
    where = f"at step {position.step}"
    not_finite = [
        name for name, loss in zip(names, sums.losses, strict=True) if not abs(loss) < float("inf")
    ]
    if not_finite:
        raise MeritFastError(
            f"train: loss is not finite {where} in dataset {', '.join(not_finite)}; {_ADVICE}"
        )
    try:
        norm = optimizer.step(rate)
    except NonFiniteGradient as error:
        guilty = _guilty_datasets(trained, optimizer, batches, len(names))
        pairs = zip(names, guilty, strict=True)
        shown = ", ".join(name for name, is_guilty in pairs if is_guilty)
        what = f"the gradient of {error.parameter}" if error.parameter else "the gradient's norm"
        raise MeritFastError(
            f"train: {what} is not finite {where} with rows of dataset {shown}; {_ADVICE}"
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


def _drop_unused(trained: TrainedModel, optimizer: MasterAdamW, config: TrainConfig) -> None:
    """Leaves parameters as they are that had no part in the step, as in one process."""
    assert trained.shards is not None
    unused = {*trained.shards.take_unused(optimizer.names)}
    if unused and config.update_in_backward is not None:
        raise MeritFastError(
            f"train: {min(unused)} has no part in the loss; freeze it (train.freeze) or leave "
            "train.update_in_backward out"
        )
    for name, parameter in zip(optimizer.names, optimizer.parameters, strict=True):
        if name in unused:
            parameter.grad = None


def _guilty_datasets(
    trained: TrainedModel, optimizer: MasterAdamW, batches: Sequence[Batch], num_datasets: int
) -> list[bool]:
    """Tells of each dataset whether its rows of the step give a gradient that is not finite.

    If none does, all datasets with rows in the step are guilty.
    """
    guilty = []
    seen = []
    optimizer.end_updates()
    for number in range(num_datasets):
        for parameter in optimizer.parameters:
            parameter.grad = None
        own = [_only_of(batch, number) for batch in batches]
        own = [batch for batch in own if batch.num_target_tokens]
        for batch in own:
            loss = trained.call(batch_loss, batch, batch.num_target_tokens, num_datasets)
            loss.loss.backward()  # type: ignore[no-untyped-call]
        guilty.append(optimizer.first_not_finite() is not None)
        seen.append(bool(own))
    return guilty if any(guilty) else seen


def _only_of(batch: Batch, number: int) -> Batch:
    """The batch with the targets of one dataset only."""
    is_own = (batch.dataset_ids == number)[:, None]
    if isinstance(batch, PackedBatch):
        is_own = is_own[:, 0].repeat_interleave(batch.cu_seqlens.diff())[None]
    return replace(batch, labels=batch.labels.where(is_own, IGNORED_LABEL))


def _backward(
    trained: TrainedModel,
    optimizer: MasterAdamW,
    batches: Sequence[Batch],
    num_datasets: int,
    rate: float,
    ranks: Ranks,
) -> DatasetSums:
    """Adds the gradients of the mean loss over the whole step's target tokens."""
    targets = sum(batch.num_target_tokens for batch in batches)
    all_tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    losses = torch.zeros(num_datasets, dtype=torch.float64)
    tokens = torch.zeros(num_datasets, dtype=torch.int64)
    shards = trained.shards
    own = ranks.share(batches) if shards is None else shards.batches_of_rank(batches)
    for batch in own:
        # a router's loss is a mean over tokens: a micro-batch counts by its share of them
        share = int(batch.attention_mask.sum()) / all_tokens
        factor = trained.router_factor * share
        loss = trained.call(batch_loss, batch, targets, num_datasets, factor)
        optimizer.backward(loss.loss, rate)
        losses += loss.dataset_losses
        tokens += loss.dataset_tokens
    ranks.add(losses, tokens)
    return DatasetSums(tuple(losses.tolist()), tuple(tokens.tolist()))
