"""The stored rows of a configured run, checked to be those of its config."""

import torch

from merit_fast.errors import InputError, MeritFastError
from merit_fast.manifests.stages import SKETCH
from merit_fast.pipeline.outputs import Outputs
from merit_fast.row_store.rows import Rows, open_rows


def open_store(outputs: Outputs) -> Rows:
    """Opens the stored rows of a run.

    Raises:
        InputError: the sketch or its store is absent, damaged or of another config; the message
            names the command that makes it.
    """
    require_store(outputs)
    if outputs.config.threads is not None:
        torch.set_num_threads(outputs.config.threads)
    return open_rows(outputs.folder(SKETCH))


def require_store(outputs: Outputs) -> None:
    """Checks that a run has stored rows of its config; raises as ``open_store``."""
    folder = outputs.folder(SKETCH)
    manifest = outputs.sketch
    try:
        outputs.require(folder, manifest)
    except InputError:
        raise
    except MeritFastError as error:
        raise InputError(f"{error} --store") from None
    if not manifest.config.get("store"):
        command = outputs.command.format(stage=SKETCH.run_by)
        raise InputError(f"{folder}: has no stored rows; run first: {command} --store")
