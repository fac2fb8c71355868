"""Token stores of two files, and their content."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.data import DataConfig, Dataset, DatasetConfig, load_mixture
from merit_fast.data.store import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG = {"prompt": "a", "completion": "1 2 3 4 5 6 7 8 9 0 " * 30}


def store_at(folder: Path, **keys: Any) -> TokenStore:
    return TokenStore(folder, {"a": "f1", "b": "f2"}, **keys)


def load(
    mixture: Sequence[DatasetConfig],
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig | None = None,
    **keys: Any,
) -> Sequence[Dataset]:
    data = data or DataConfig(max_length=60, ignore_columns=("more",))
    return load_mixture(mixture, tokenizer, data, part="train", **keys)


def content(datasets: Sequence[Dataset]) -> list[tuple[Any, ...]]:
    return [
        (d.name, d.notes, [(e.input_ids.tolist(), e.labels.tolist()) for e in d.examples])
        for d in datasets
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by fingerprint and name: each has one choice of rows."""
    return {
        f"{path.relative_to(folder).parts[0]}/{path.name}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
