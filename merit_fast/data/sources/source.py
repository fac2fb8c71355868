"""The place of a dataset's rows, as an entry of `mixture:` names it, and a folder of files."""

from dataclasses import dataclass
from typing import Protocol


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


class Folder(Protocol):
    """A folder of this machine or of a store."""

    @property
    def name(self) -> str:
        """Path or URL."""

    def names(self) -> list[str]:
        """Paths of all files in it, relative, with ``/``, sorted; none is hidden."""

    def text(self, name: str) -> str:
        """The content of a text file."""

    def join(self, name: str) -> str:
        """The name by which a file is opened."""
