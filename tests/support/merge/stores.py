"""Merges from and to stores, and their trees of files."""

import itertools

from support.checks import tree_bytes
from support.s3_server import get_tree

from merit_fast.merge import merge_models

SMALL = {
    "threads": 3,
    "chunk_kib": 8,
    "weights": "uniform",
}  # several chunks and several readers for small models


LEAVE_OUT = ("stage.json",)  # names the inputs


NUMBERS = itertools.count()


def merge(models, out, base=None, progress=None, share=(1, 1), dry_run=False, **options):
    return merge_models(
        models,
        base=base,
        out=out,
        progress=progress,
        dry_run=dry_run,
        share=share,
        **{**SMALL, **options},
    )


def tree(place, tmp_path):
    return tree_bytes(get_tree(place, tmp_path / f"copy{next(NUMBERS)}"), LEAVE_OUT)


def local_tree(models, directory, **options):
    merge(models, directory, **options)
    return tree_bytes(directory, LEAVE_OUT)
