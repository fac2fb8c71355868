"""Inputs decoded while they are read: quantised tensors, adapters on a base."""

from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.adapters.folder import is_adapter
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.dcp.opening import open_checkpoint
from merit_fast.merge.read.names.wrappers import without_wrappers
from merit_fast.merge.read.quantised.join import join_scales
from merit_fast.merge.read.remote import Location


def read_input(
    path: Location,
    base: Checkpoint | None,
    unscaled_fp8: bool = False,
    subtree: str | None = None,
    config: Location | None = None,
) -> Checkpoint:
    """One model to merge: a checkpoint, quantised or not, or a LoRA adapter on the base.

    Raises:
        InputError: an adapter without a base, or one that does not fit it; see
            ``open_checkpoint`` and ``join_scales``.
    """
    if not is_adapter(path):
        return join_scales(without_wrappers(open_checkpoint(path, subtree, config)), unscaled_fp8)
    if base is None:
        rule = f"{path}: is an adapter and needs the model it was trained on"
        raise OptionError(rule, "base", "give {}")
    from merit_fast.merge.read.adapters.adapter import read_adapter
    from merit_fast.merge.read.names.adapted import put_on_named_base

    return put_on_named_base(read_adapter(path), base)
