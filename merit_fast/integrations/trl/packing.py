"""Packed rows that still tell the dataset of each token."""

from collections.abc import Sequence
from typing import Any

from trl.data_utils import pack_dataset

from merit_fast.errors import InputError
from merit_fast.integrations.one_dataset import dataset_ids
from merit_fast.integrations.per_dataset.codes import CODES, example_codes


def pack_rows(
    rows: Any,
    length: int,
    strategy: str = "bfd",
    *,
    column: str = "dataset_id",
    names: Sequence[str] | None = None,
    seed: int | None = None,
) -> tuple[Any, list[str]]:
    """Packs tokenised rows as TRL does, and keeps the dataset of each token.

        packed, names = pack_rows(rows, 1024)
        trainer = SFTTrainer(model, SFTConfig(out, padding_free=True, max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True}), train_dataset=packed)
        MeritCallback(names=names).attach(trainer)

    ``MeritSFTTrainer`` does all of this from its rows. The codes are a column of integers, one per
    token, that TRL packs with the tokens.

    Args:
        rows: a ``datasets.Dataset`` with ``input_ids``, ``labels`` and ``column``.
        length: tokens of a packed row.
        strategy: "bfd", "bfd_split" or "wrapped", as TRL's ``pack_dataset``.
        column: column with the dataset's name, a str or int.
        names: datasets that may occur, in the order of their numbers; None: those that occur.
        seed: shuffles the rows before they are packed; None: keeps their order.

    Returns:
        (packed rows with ``input_ids``, ``labels``, ``merit_codes`` and, unless "wrapped",
        ``seq_lengths``; the names that the codes number).

    Raises:
        InputError: a column is missing, a row tells no dataset, or one that ``names`` lacks.
    """
    present = getattr(rows, "column_names", None)
    if present is None or not hasattr(rows, "__len__"):
        raise InputError("train_dataset: must be a datasets.Dataset for packing, got a stream")
    for needed in ("input_ids", "labels", column):
        if needed not in present:
            raise InputError(f"train_dataset: {needed}: is missing; columns: {', '.join(present)}")
    ids = dataset_ids(rows, column)
    listed = sorted(set(ids)) if names is None else list(names)
    unknown = sorted(set(ids) - set(listed))
    if unknown:
        raise InputError(
            f"train_dataset: {column}: must be one of {', '.join(listed)}, got {unknown[0]}"
        )
    numbers = {name: number for number, name in enumerate(listed)}
    rows = rows.remove_columns([name for name in present if name not in _KEPT])

    def with_codes(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {CODES: example_codes(numbers[ids[index]], len(row["input_ids"]))}

    rows = rows.map(with_codes, with_indices=True, desc="Numbering datasets")
    if seed is not None:
        rows = rows.shuffle(seed=seed)
    return pack_dataset(rows, length, strategy), listed


_KEPT = ("input_ids", "labels")
