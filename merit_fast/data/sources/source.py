"""The place of a dataset's rows, as an entry of `mixture:` names it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A file, a directory, a glob, a URL or a Hugging Face dataset, and the split in it.

    Attributes:
        path: as in `mixture:`; relative paths count from the current directory.
        split: the name of the split, or an expression of ``datasets`` such as ``train[:10%]``.
        config: the configuration of a Hugging Face dataset or of its clone.
        revision: the branch, tag or commit of a Hugging Face dataset.
        data_files: globs of files in the directory or on the hub; they replace the search.
        any_split: a directory that holds one split is read whatever the split's name is.
    """

    path: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    any_split: bool = False
