"""The files of a distributed checkpoint that hold no weights."""

import shutil
from pathlib import Path

from merit_fast.merge.engine.prepare import Inputs
from merit_fast.merge.read.companions import copy_companions, output_dtypes
from merit_fast.merge.read.files import copy_file, list_directory
from merit_fast.merge.write.distcp.layout import DistributedLayout
from merit_fast.merge.write.distcp.metadata import write_metadata
from merit_fast.merge.write.distcp.plan import WHOLE_FOLDER

# Megatron keeps its arguments in common.pt and names the form in metadata.json.
KEPT_FILES = ("common.pt", "metadata.json")


def finish_distributed(layout: DistributedLayout, inputs: Inputs, directory: Path) -> None:
    """Adds config.json and tokenizer, Megatron's own files and, last, ``.metadata``."""
    shutil.rmtree(directory / WHOLE_FOLDER, ignore_errors=True)
    tensors = layout.tensors.values()
    dtypes = output_dtypes((tensor.dtype, tensor.num_elements) for tensor in tensors)
    copy_companions(inputs.companions, directory, dtypes, dequantized=inputs.dequantized)
    for name in kept_files(layout):
        assert layout.source is not None
        copy_file(layout.source.folder / name, directory / name)
    write_metadata(layout, directory)


def kept_files(layout: DistributedLayout) -> list[str]:
    """Files next to the first input's shards that the output gets unread."""
    if layout.source is None:
        return []
    present = list_directory(layout.source.folder)
    return [name for name in KEPT_FILES if name in present]
