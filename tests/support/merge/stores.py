"""Merges from and to stores, and their trees of files."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.checks import tree_bytes
from support.merge.s3_server import get_tree

from merit_fast.merge import merge_models
from merit_fast.merge.read.remote import Location
from merit_fast.progress import Progress

SMALL: dict[str, Any] = {
    "threads": 3,
    "chunk_kib": 8,
    "weights": "uniform",
}  # several chunks and several readers for small models


LEAVE_OUT = ("stage.json",)  # names the inputs


NUMBERS = itertools.count()


def merge(
    models: Sequence[Location | str],
    out: Location | str,
    base: Location | str | None = None,
    progress: Progress | None = None,
    share: tuple[int, int] = (1, 1),
    dry_run: bool = False,
    **options: Any,
) -> dict[str, Any]:
    return merge_models(
        models,
        base=base,
        out=out,
        progress=progress,
        dry_run=dry_run,
        share=share,
        **{**SMALL, **options},
    )


def tree(place: Any, tmp_path: Path) -> dict[str, str]:
    return tree_bytes(get_tree(place, tmp_path / f"copy{next(NUMBERS)}"), LEAVE_OUT)


def local_tree(models: Sequence[Location | str], directory: Path, **options: Any) -> dict[str, str]:
    merge(models, directory, **options)
    return tree_bytes(directory, LEAVE_OUT)
