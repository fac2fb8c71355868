"""Names under which transformers stores a model's tensors, and the elements that each name holds.

Transformers stacks experts that files hold one by one. A stored tensor is then a run of elements of
a parameter, which each process finds among its own rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from merit_fast.errors import InputError


@dataclass(frozen=True)
class Run:
    """A run of a tensor's elements in row-major order, as a tensor of its own.

    Attributes:
        name: of the tensor in the model.
        start: the first element.
        shape: of the stored tensor.
    """

    name: str
    start: int
    shape: torch.Size

    @property
    def elements(self) -> tuple[int, int]:
        """The first element and the number of elements."""
        return self.start, self.shape.numel()


class _Views(TorchFunctionMode):
    """Lets no tensor be copied only to lie in order, so that a part stays a view of its whole."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.contiguous:
            return args[0]
        return function(*args, **(kwargs or {}))


def stored_runs(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Run]:
    """Stored name -> its run, in the order in which transformers writes them.

    Args:
        model: a language model; its own conversions decide, else those of its kind.
        tensors: the model's tensors by name; only their shapes are read.

    Raises:
        InputError: a conversion is more than names, stacks and joints along the first dimension.
    """
    hollow = _hollow(tensors)
    names = {_memory(tensor): name for name, tensor in hollow.items()}
    with _Views():
        views = _written(model, hollow)
    runs = {}
    for stored, view in views.items():
        name = names.get(_memory(view))
        if name is None or not view.is_contiguous():
            raise InputError(
                "train.shard: must be none, transformers changes the order of numbers of "
                f"{stored} as it loads it"
            )
        runs[stored] = Run(name, int(view.storage_offset()), view.shape)
    return runs


def plan_files(model: Any, tensors: Mapping[str, Tensor], max_shard_size: str) -> Any:
    """The files into which transformers writes a model: huggingface_hub's ``StateDictSplit``.

    Parts that lie in one block of memory as it writes them, such as the experts of a layer, come
    into one file.

    Args:
        model: a language model.
        tensors: the model's tensors by name; only their shapes are read.
        max_shard_size: largest weight file, as ``save_pretrained`` reads it.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    return split_state_dict_into_shards_factory(
        _written(model, _hollow(tensors)),
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        get_storage_id=_memory,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def _hollow(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }


def _written(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as ``save_pretrained`` writes them."""
    from transformers.core_model_loading import revert_weight_conversion

    views: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return views


def _memory(tensor: Tensor) -> int:
    """Number of the block of memory in which a tensor lies, while both are alive."""
    return int(tensor.untyped_storage()._cdata)
