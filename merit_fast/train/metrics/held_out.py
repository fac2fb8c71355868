"""The loss on held-out rows while a branch is trained."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from merit_fast.data import Batch, Dataset, collate
from merit_fast.errors import InputError
from merit_fast.model import fit_trees
from merit_fast.train.config import TrainConfig
from merit_fast.train.loss import batch_loss
from merit_fast.train.metrics.record import DatasetSums
from merit_fast.train.parallel.ranks import Ranks
from merit_fast.train.prepare import TrainedModel
from merit_fast.train.resume import Position


class HeldOut:
    """The held-out rows of a branch's datasets.

    Args:
        branch: the branch's name.
        trained: its datasets.
        held_out: held-out rows; those of other datasets do not count.
        config: the recipe.
        padding: the id that fills batches.

    Raises:
        InputError: a dataset has no held-out row, and ``evaluate_steps`` asks for a measurement.
    """

    def __init__(
        self,
        branch: str,
        trained: Sequence[Dataset],
        held_out: Sequence[Dataset],
        config: TrainConfig,
        padding: int,
    ) -> None:
        self.config = config
        self.padding = padding
        by_name = {dataset.name: dataset for dataset in held_out if dataset.num_target_tokens}
        self.datasets: list[Dataset] = []
        if config.evaluate_steps is None:
            return
        for dataset in trained:
            if dataset.name not in by_name:
                raise InputError(
                    f"train.evaluate_steps: needs held-out rows of every dataset of {branch}, "
                    f"{dataset.name} has none; give it an eval_path or eval_split"
                )
            self.datasets.append(by_name[dataset.name])

    def is_due(self, step: int, steps: int) -> bool:
        """Whether a measurement follows this step: every so many, and at the end."""
        every = self.config.evaluate_steps
        return every is not None and (step % every == 0 or step == steps)

    def is_over(self, position: Position) -> bool:
        """Whether the last ``patience`` measurements were no better than an earlier one."""
        patience = self.config.patience
        best = position.best
        if patience is None or best is None:
            return False
        return len(position.held_out) - 1 - best >= patience

    def measure(self, trained: TrainedModel, ranks: Ranks) -> DatasetSums:
        """Nats and target tokens of every dataset, in evaluation mode; the processes share rows."""
        losses = torch.zeros(len(self.datasets), dtype=torch.float64)
        tokens = torch.zeros(len(self.datasets), dtype=torch.int64)
        model = trained.model
        model.eval()
        shards = trained.shards
        batches = list(self._batches(model if shards is None else None))
        own = ranks.share(batches) if shards is None else shards.batches_of_rank(batches)
        with torch.no_grad():
            for batch in own:
                loss = trained.call(batch_loss, batch, 1, len(self.datasets))
                losses += loss.dataset_losses
                tokens += loss.dataset_tokens
        model.train()
        ranks.add(losses, tokens)
        return DatasetSums(tuple(losses.tolist()), tuple(tokens.tolist()))

    def _batches(self, model: nn.Module | None) -> Iterator[Batch]:
        """Every row; a divided model, None here, is not asked whether it reads trees."""
        size = -(-self.config.batch_size // self.config.accumulation)
        for number, dataset in enumerate(self.datasets):
            texts, _ = fit_trees(model, list(dataset.examples))
            order = sorted(range(len(texts)), key=lambda i: (len(texts[i].input_ids), i))
            for first in range(0, len(order), size):
                rows = [texts[i] for i in order[first : first + size]]
                yield collate(rows, [number] * len(rows), self.padding)
