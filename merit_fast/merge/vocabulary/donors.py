"""The models of a merge with their vocabularies, and how options name them."""

from collections.abc import Sequence
from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.adapters.folder import is_adapter
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.files import folder_of, is_directory
from merit_fast.merge.read.remote import Location, as_location
from merit_fast.merge.vocabulary.matrices import embedding_of
from merit_fast.merge.vocabulary.tokens import (
    TOKENIZER_FILE,
    Vocabulary,
    find_vocabulary,
    has_vocabulary,
    list_the_same,
    read_vocabulary,
)
from merit_fast.records import record


@record
class Donor:
    """One input of the merge. ``folder``: the directory of its tokenizer.json; None: it has none.

    ``num_rows``: rows of its input embedding.
    """

    checkpoint: Checkpoint
    folder: Location | None
    num_rows: int

    @property
    def path(self) -> Location:
        return self.checkpoint.path

    def vocabulary(self) -> Vocabulary:
        """Its tokens, without those that have no row.

        Raises:
            InputError: it has no tokenizer.json; see ``read_vocabulary``.
        """
        vocabulary = self.listed_vocabulary()
        if vocabulary is None:
            rule = (
                f"{self.path}: holds no {TOKENIZER_FILE} that lists tokens, the texts of its rows"
            )
            raise OptionError(rule, "tokenizer", "{} matches rows by their ids, unchecked", "ids")
        return vocabulary

    def listed_vocabulary(self) -> Vocabulary | None:
        """The same; None where no file lists its tokens."""
        vocabulary = None if self.folder is None else find_vocabulary(self.folder)
        return None if vocabulary is None else vocabulary.below(self.num_rows)


@record
class Donors:
    """All inputs of a merge, each once.

    Attributes:
        all: the models, and the base.
        home: number of the model that the others follow: it gives the ids of a union.
        base: number of the model whose rows win; None: there is no base.
    """

    all: tuple[Donor, ...]
    home: int
    base: int | None

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return [donor.checkpoint for donor in self.all]

    def number_of(self, text: str) -> int | None:
        """The model that a text names; None: none of them."""
        location = as_location(text)
        for number, donor in enumerate(self.all):
            if donor.path == location or str(donor.path) == text:
                return number
        if isinstance(location, Path) and location.exists():
            resolved = location.resolve()
            for number, donor in enumerate(self.all):
                if isinstance(donor.path, Path) and donor.path.resolve() == resolved:
                    return number
        return None

    def are_alike(self) -> bool:
        """Whether all have as many rows, and the same tokens where a tokenizer.json lists them."""
        if any(donor.num_rows != self.all[0].num_rows for donor in self.all):
            return False
        folders = dict.fromkeys(donor.folder for donor in self.all if donor.folder)
        return len(folders) < 2 or list_the_same(list(folders))


def find_donors(
    models: Sequence[Checkpoint], base: Checkpoint | None, chosen: Location | None
) -> Donors | None:
    """The inputs as donors of rows; None where some model has no input embedding.

    Args:
        models: of the merge.
        base: from which the models started.
        chosen: the model that counts as base for the vocabulary; None: ``base``, if there is one.
    """
    by_path = {checkpoint.path: checkpoint for checkpoint in models}
    if base is not None:
        by_path.setdefault(base.path, base)
    donors = []
    for path, checkpoint in by_path.items():
        embedding = embedding_of(checkpoint)
        if embedding is None:
            return None
        folder: Location | None = folder_of(path)
        if not has_vocabulary(folder_of(path)):
            folder = folder_of(base.path) if base is not None and is_adapter(path) else None
            folder = folder if folder is not None and has_vocabulary(folder) else None
        donors.append(Donor(checkpoint, folder, embedding.shape[0]))
    paths = list(by_path)
    wanted = chosen if chosen in by_path else base.path if base else None
    number = paths.index(wanted) if wanted is not None else None
    first = next((n for n, path in enumerate(paths) if not is_adapter(path)), 0)
    return Donors(tuple(donors), first if number is None else number, number)


def foreign_vocabulary(source: str) -> Vocabulary:
    """The vocabulary of a tokenizer that belongs to no input.

    Raises:
        InputError: the text names no directory, URL or hub id with a tokenizer.json.
    """
    from merit_fast.model import resolve_model

    local = Path(source).expanduser().is_dir() or "://" in source
    try:
        folder = as_location(source) if local else resolve_model(source)
    except InputError as error:
        rule = "must be union, base, ids, one of the models, or another directory or hub id"
        reason = str(error).removeprefix("model: ")
        raise InputError(f"tokenizer.source: {rule}, got {source!r}: {reason}") from None
    if not is_directory(folder) or not has_vocabulary(folder):
        raise InputError(f"tokenizer.source: {folder}: holds no {TOKENIZER_FILE}")
    return read_vocabulary(folder)
