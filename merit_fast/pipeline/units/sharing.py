"""Numbers of shares into which the work of one unit is cut; the config and the rows decide them.

They decide who does what, and no result: spans of a sketch and files of a merge are fixed without
them.
"""

from merit_fast.data.mixture.select import MixtureRows
from merit_fast.kernels.average.dtypes import ITEM_BYTES, SHORT_NAMES
from merit_fast.merge.sizes import parse_bytes
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.preflight.base import num_parameters
from merit_fast.split.config import SplitConfig

_MOST_OF_A_MERGE = 16  # shares: each reads the headers of all branches


def sketch_shares(split: SplitConfig, rows: MixtureRows) -> dict[str, int]:
    """Dataset -> number of spans that its rows may fill; no row is read if one is enough for all.

    A dataset whose rows become more or fewer examples has other spans than this; shares take every
    n-th of them, and some may get none.
    """
    config = split.sketch_config()
    if config.precision or (config.examples != "all" and config.examples <= config.span):
        return {}
    selections = rows.select("train").items()
    return {name: config.num_spans(len(selection.rows)) for name, selection in selections}


def merge_shares(outputs: Outputs) -> int:
    """About the number of files of a merge, by the options and the base's size; at most 16.

    Shares take every n-th file, and the last may get none. A merge that is tuned on held-out rows,
    writes statistics or has another form is not shared, nor are merges of adapters.
    """
    merge = outputs.config.merge
    train = outputs.config.train
    is_plain = merge.form in (None, "safetensors") and merge.dtype in (None, *SHORT_NAMES)
    if not is_plain or merge.is_tuned or merge.stats or train.adapter.is_on:
        return 1
    size = merge.shard_size or train.max_shard_size
    dtype = SHORT_NAMES[merge.dtype or train.dtype]
    total = num_parameters(outputs.base) * ITEM_BYTES[dtype]
    return max(1, min(_MOST_OF_A_MERGE, -(-total // parse_bytes("shard_size", size))))
