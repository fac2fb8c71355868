"""Losses and greedy exact match of one model on tokenized rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from merit_fast.data import Batch, Dataset, Example, collate, count_target_tokens
from merit_fast.evaluate.prefixes import (
    Prefixes,
    agrees,
    fill_prefixes,
    is_worthwhile,
    shared_length,
    trial_rows,
    without_prefix,
)
from merit_fast.manifests.schemas import DatasetResult
from merit_fast.model import fit_trees, model_inputs, score_targets

_BATCH_TOKENS = 8192  # padded tokens of one pass, unless one row has more
_FULL_TOKENS = 256  # a batch of so many tokens may end early to save padding
_PADDING = 0.125  # share of a batch
_WIDTHS = 4  # batches are padded to a multiple: each new shape costs a kernel's set-up
_PREFIX_TOKENS = 8192  # padded tokens of the beginnings whose keys and values are kept at once

Advance = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class RowScores:
    """Scores of N rows, all [N] and float64."""

    loss: Tensor  # nats, summed over the row's target tokens
    exact: Tensor  # 1 where every target is the greedy choice, else 0
    tokens: Tensor  # target tokens


def dataset_results(scores: RowScores, datasets: Sequence[Dataset]) -> dict[str, DatasetResult]:
    """Loss per target token and share of exact rows of every dataset, from its rows' scores.

    A row is exact if every target is the greedy choice. Greedy decoding writes such a row exactly,
    since each step then sees the targets before it, so no generation is needed.
    """
    results = {}
    first = 0
    for dataset in datasets:
        rows = slice(first, first + dataset.num_examples)
        first += dataset.num_examples
        tokens = dataset.num_target_tokens
        loss = float(scores.loss[rows].sum()) / tokens
        exact_match = float(scores.exact[rows].mean())
        results[dataset.name] = DatasetResult(loss, exact_match, tokens, dataset.num_examples)
    return results


def mean_loss(
    model: nn.Module, examples: Sequence[Example], pad_token_id: int, batch_size: int
) -> float:
    """Nats per target token over all rows."""
    scores = score_rows(model, [examples], pad_token_id, batch_size)
    return float(scores.loss.sum()) / float(scores.tokens.sum())


def score_rows(
    model: nn.Module,
    groups: Sequence[Sequence[Example]],
    pad_token_id: int,
    batch_size: int,
    share: bool = False,
    advance: Advance = lambda tokens: None,
) -> RowScores:
    """Scores the rows of all groups, in their order.

    Batches join rows of similar length from all groups. A tree counts as one row, also for a model
    that reads its texts one by one.

    Args:
        model: a causal language model.
        groups: rows, such as those of a dataset; ``share`` uses that a group's rows begin alike.
        pad_token_id: the id that fills batches.
        batch_size: the most rows of a batch.
        share: computes the common beginning of each group's rows once; ``can_share`` tells whether
            the model can.
        advance: gets the number of tokens of every finished batch.

    Raises:
        ValueError: ``share`` with a model that cannot, or with trees.
    """
    every = [row for rows in groups for row in rows]
    sums = torch.zeros(3, len(every), dtype=torch.float64)
    sums[2] = torch.tensor([count_target_tokens(row.labels) for row in every])
    wrong = torch.zeros(len(every), dtype=torch.float64)
    texts, row_of_text = fit_trees(model, every)
    if any(row.tree is not None for row in every):
        if share:
            raise ValueError("score_rows: trees share their beginnings already")
        groups = [texts]
    done: set[int] = set()
    for chunk in _chunks(groups, share):
        for batch, rows, inputs in _batches(model, chunk, pad_token_id, batch_size):
            with torch.inference_mode():
                loss, correct, row, _ = score_targets(model(**inputs).logits, batch)
            numbers = [row_of_text[i] for i in rows]
            row_of_target = torch.tensor(numbers)[row.cpu()]
            sums[0].index_add_(0, row_of_target, loss.double().cpu())
            wrong.index_add_(0, row_of_target, (~correct).double().cpu())
            new = set(numbers) - done
            done |= new
            advance(sum(len(every[i].input_ids) for i in new))
    return RowScores(sums[0], (wrong == 0).double(), sums[2])


def can_share(model: nn.Module, groups: Sequence[Sequence[Example]], pad_token_id: int) -> bool:
    """Whether common beginnings are worth computing once, and give this model the same losses."""
    if not is_worthwhile(groups):
        return False
    trial = trial_rows(groups)
    try:
        shared = score_rows(model, trial, pad_token_id, len(groups[0]), share=True)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):
        return False  # a forward of another kind; the plain pass serves every model
    plain = score_rows(model, trial, pad_token_id, len(groups[0]))
    return agrees(plain.loss, shared.loss, plain.tokens, next(model.parameters()).dtype)


@dataclass(frozen=True)
class _Chunk:
    """Groups whose beginnings fit into one pass; ``first`` is the number of their first row."""

    groups: list[Sequence[Example]]
    lengths: list[int]
    first: int


def _chunks(groups: Sequence[Sequence[Example]], share: bool) -> Iterator[_Chunk]:
    chunk = _Chunk([], [], 0)
    for rows in groups:
        length = shared_length(rows) if share else 0
        longest = max([length, *chunk.lengths])
        if chunk.groups and longest * (len(chunk.groups) + 1) > _PREFIX_TOKENS:
            yield chunk
            chunk = _Chunk([], [], chunk.first + sum(map(len, chunk.groups)))
        chunk.groups.append(rows)
        chunk.lengths.append(length)
    yield chunk


def _batches(
    model: nn.Module, chunk: _Chunk, pad_token_id: int, batch_size: int
) -> Iterator[tuple[Tensor, list[int], dict[str, object]]]:
    """Yields targets, numbers of the rows and arguments of the forward of every batch."""
    rows = [
        without_prefix(row, length)
        for group, length in zip(chunk.groups, chunk.lengths, strict=True)
        for row in group
    ]
    group_of = torch.tensor([g for g, group in enumerate(chunk.groups) for _ in group])
    prefixes = _prefixes(model, chunk, pad_token_id)
    for chosen in _by_length(rows, batch_size):
        picked = [rows[i] for i in chosen]
        batch: Batch = collate(picked, [0] * len(picked), pad_token_id, pad_to_multiple_of=_WIDTHS)
        inputs, targets = model_inputs(model, batch)
        if prefixes is not None:
            inputs = prefixes.extend(inputs, group_of[chosen].to(targets.device))
        yield targets, [chunk.first + i for i in chosen], inputs


def _prefixes(model: nn.Module, chunk: _Chunk, pad_token_id: int) -> Prefixes | None:
    if not any(chunk.lengths):
        return None
    beginnings = [
        group[0].input_ids[:length] if length else ()
        for group, length in zip(chunk.groups, chunk.lengths, strict=True)
    ]
    prefixes = fill_prefixes(model, beginnings, pad_token_id)
    if prefixes is None:
        raise ValueError("score_rows: this model's cache is not keys and values only")
    return prefixes


def _by_length(rows: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Numbers of the rows of each batch, shortest rows first, with little padding."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids), i))
    chosen: list[int] = []
    tokens = 0
    for i in order:
        length = len(rows[i].input_ids)
        padded = length * (len(chosen) + 1)
        is_sparse = tokens >= _FULL_TOKENS and padded - length - tokens > _PADDING * padded
        if chosen and (len(chosen) == batch_size or padded > _BATCH_TOKENS or is_sparse):
            yield chosen
            chosen = []
            tokens = 0
        chosen.append(i)
        tokens += length
    if chosen:
        yield chosen
