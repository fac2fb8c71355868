"""The rows of a run: loaded once, and only when a stage has work to do."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from merit_fast.data import (
    Dataset,
    Example,
    load_mixture,
    load_tokenizer_or_processor,
    pad_token_id,
    tokenizer_of,
)
from merit_fast.data.config import DatasetConfig, Part
from merit_fast.data.fingerprint import image_hashes
from merit_fast.data.mixture.select import MixtureRows, ScanCache
from merit_fast.data.sources import Source, source_content
from merit_fast.data.stops import require_stops
from merit_fast.data.store import Draw, TokenStore
from merit_fast.manifests.io import fingerprint
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.pipeline.arms import Branch, branches_part, merit_steps, whole_mixture
from merit_fast.pipeline.outputs import Outputs
from merit_fast.progress import Progress
from merit_fast.train.schedule import num_steps

TOKENS_FOLDER = "tokens"  # of a run's output: a cache, and no result
TARGETS_FOLDER = "targets"  # the same, for sketches of rows that are not in the mixture


class DecodedTexts(Sequence[str]):
    """The texts of examples, without special tokens; none is kept.

    Args:
        examples: the examples, such as those of a dataset.
        tokenizer: the tokenizer that made their tokens.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: Any) -> None:
        self._examples = examples
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        ids = self._examples[index].input_ids
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class RunData:
    """Tokenizer and datasets of one configured run.

    ``writes``: whether rows that are tokenized may be kept in the run's output.
    """

    def __init__(self, outputs: Outputs, progress: Progress, writes: bool = True) -> None:
        self.outputs = outputs
        self.writes = writes
        self.config = outputs.config
        self.progress = progress

    @functools.cached_property
    def processor(self) -> Any:
        """The base's tokenizer; of a base that reads images its processor."""
        return load_tokenizer_or_processor(str(self.outputs.base))

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.processor)

    @functools.cached_property
    def pad_token_id(self) -> int:
        return pad_token_id(self.tokenizer)

    @functools.cached_property
    def rows(self) -> MixtureRows:
        """The rows of every part, from one scan of each source."""
        config = self.config
        hashes = self.outputs.records.hashes

        def content(config: DatasetConfig, place: Source) -> str:
            images = image_hashes(config, place, str(self.outputs.base), hashes)
            return fingerprint({"rows": source_content(place, hashes), "images": images})

        cache = ScanCache(self._tokens, content) if self.writes else None
        return MixtureRows(config.mixture, config.data, cache)

    @functools.cached_property
    def train(self) -> list[Dataset]:
        """All training rows."""
        return self._load("train")

    @functools.cached_property
    def branch(self) -> list[Dataset]:
        """Training rows that the branches of an arm share: all except those of a warm-up."""
        rows = whole_mixture(self.outputs.contents, branches_part(self.config))
        return list(Branch("", "", 0, rows).choose(self.train, self.config.split))

    @functools.cached_property
    def sketched(self) -> list[Dataset]:
        """Datasets with at least the examples that the sketch draws.

        They are all of the branches' rows where these are loaded, or a warm-up takes some of them.
        """
        split = self.config.split
        if "train" in self.__dict__ or split.warmup or split.examples == "all":
            return self.branch
        return self._load("train", Draw(split.examples, split.sketch_config().seed))

    @functools.cached_property
    def held_out(self) -> tuple[list[Dataset], list[Dataset]]:
        """Held-out rows that choose a merge or a checkpoint, and those that report.

        All of them report where nothing is chosen.
        """
        from merit_fast.tune.rows import split_held_out

        rows = self._load("eval")
        return split_held_out(rows) if self.config.halves_held_out else ([], rows)

    @property
    def tuning(self) -> list[Dataset]:
        """Held-out rows that tune a merge or end a branch."""
        return self.held_out[0]

    @property
    def reporting(self) -> list[Dataset]:
        """Held-out rows on which every arm is measured."""
        return self.held_out[1]

    @property
    def watched(self) -> list[Dataset]:
        """Held-out rows on which branches are measured while they are trained."""
        train = self.config.train
        if train.evaluate_steps is None:
            return []
        return self.reporting if train.patience is None else self.tuning

    def texts(self) -> dict[str, DecodedTexts]:
        """The branches' rows as text, by dataset; decoded one at a time."""
        return {
            dataset.name: DecodedTexts(dataset.examples, self.tokenizer) for dataset in self.branch
        }

    def num_steps(self, datasets: Sequence[Dataset]) -> int:
        """Optimizer steps of a run on these datasets."""
        rows = sum(dataset.num_examples for dataset in datasets)
        return num_steps(rows, self.config.train)

    def branch_steps(self, split: SplitManifest) -> list[int]:
        """Optimizer steps of each of merit's branches, [K]; no row is read for it."""
        return merit_steps(self.config, split, self.outputs.contents)

    def _store(self, part: Part, draw: Draw | None) -> TokenStore:
        """The place of the tokenized rows of this part."""
        prints = self.outputs.contents if part == "train" else self.outputs.held_out_contents
        return TokenStore(self._tokens, prints, self.outputs.records.whole, self.writes, draw)

    @property
    def _tokens(self) -> Path:
        return self.outputs.root / TOKENS_FOLDER

    def load(self, part: Part, draw: Draw | None = None) -> list[Dataset]:
        """The datasets of one part, loaded once more on every call; shows no notes.

        Args:
            part: "train" or "eval".
            draw: what a sketch draws, to tokenize no other rows; None: all rows.
        """
        datasets = load_mixture(
            self.config.mixture,
            self.processor,
            self.config.data,
            part=part,
            rows=self.rows,
            store=self._store(part, draw),
            progress=self.progress,
        )
        if part == "train":
            require_stops(datasets, self.config.mixture, self.config.data, self.processor)
        return datasets

    def _load(self, part: Part, draw: Draw | None = None) -> list[Dataset]:
        mixture = self.config.mixture
        datasets = self.load(part, draw)
        for dataset in datasets:
            for note in dataset.notes:
                self.progress.note(f"{dataset.name} ({part}): {note}")
        absent = len(mixture) - len(datasets)
        if part == "eval" and absent:
            self.progress.note(
                f"evaluate: {absent} of {len(mixture)} datasets have no held-out rows"
            )
        return datasets
