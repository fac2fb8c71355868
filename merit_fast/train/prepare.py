"""The model of a branch, ready to train: frozen parts, our kernels, an adapter, checkpointing."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from merit_fast.errors import InputError
from merit_fast.model import (
    DTYPES,
    freeze_parameters,
    load_model,
    no_loading_bar,
    return_freed_memory,
    settle_dtype,
)
from merit_fast.patch.model import Patch, patch_model
from merit_fast.train.adapter.build import add_adapter, require_peft
from merit_fast.train.adapter.save import write_adapter
from merit_fast.train.config import TrainConfig
from merit_fast.train.loss import router_coefficient
from merit_fast.train.parallel.load import fill_model, make_hollow_model
from merit_fast.train.parallel.ranks import ONE_PROCESS, Ranks
from merit_fast.train.parallel.save import write_model
from merit_fast.train.parallel.shards import Shards, divide_model

T = TypeVar("T")


@dataclass(frozen=True)
class TrainedModel:
    """A model in training mode.

    ``adapted``: the ``PeftModel`` around it, where it has one; ``shards``: the module that gathers
    its weights, where the processes divide it.
    """

    model: nn.Module
    patch: Patch
    router_factor: float
    adapted: Any = None
    shards: Shards | None = None

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs ``function(model, *arguments)`` with all weights at hand."""
        if self.shards is None:
            return function(self.model, *arguments)
        result: T = self.shards(function, *arguments)
        return result

    def write(self, start_path: str, directory: Path, config: TrainConfig, ranks: Ranks) -> None:
        """Writes the branch's weights: a whole model, or a PEFT folder.

        Every process of a divided model calls it, else the leader.
        """
        if self.shards is not None and not config.adapter.is_on:
            write_model(self.model.eval(), directory, config.max_shard_size, ranks)
            return
        if not ranks.leads:
            return
        if config.adapter.is_saved_apart:
            write_adapter(self.adapted, start_path, directory)
            generation: Any = self.model.generation_config
            generation.save_pretrained(directory)  # a whole model is saved with it
            return
        whole: Any = self.model
        if self.adapted is not None:
            # PEFT announces its progress on stderr
            with contextlib.redirect_stderr(io.StringIO()):
                whole = self.adapted.merge_and_unload(progressbar=False)
        with no_loading_bar():
            whole.eval().save_pretrained(directory, max_shard_size=config.max_shard_size)


def prepare_model(start_path: str, config: TrainConfig, ranks: Ranks = ONE_PROCESS) -> TrainedModel:
    """Loads the start and makes it trainable by the recipe; ``ranks`` divide it if it says so.

    Raises:
        InputError: the recipe does not fit the model; a package is missing.
    """
    require_peft(config.adapter)
    shards = None
    if config.shard == "full" and ranks.size > 1:
        return_freed_memory()  # else gathered weights stay as holes in the heap
        model = make_hollow_model(start_path, config.dtype).train()
        frozen = freeze_parameters(model, config.freeze)
        shards = divide_model(model, ranks)
        fill_model(model, start_path, ranks)
    else:
        quantised = _four_bits(config) if config.adapter.base == "4bit" else {}
        model = load_model(start_path, config.dtype, **quantised).train()
        frozen = freeze_parameters(model, config.freeze)
    router_factor = router_coefficient(model)
    patch = patch_model(model, config.kernels)
    adapted = None
    if config.adapter.is_on:
        adapted = add_adapter(model, config.adapter, frozen, config.seed)
        model.train()
    if config.gradient_checkpointing:
        _checkpoint_layers(model)
    return TrainedModel(model, patch, router_factor, adapted, shards)


def check_checkpointing(model: nn.Module) -> None:
    """Checks that the model can compute its layers again in the backward pass.

    Raises:
        InputError: transformers offers it for no layer of this model.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(
            f"train.gradient_checkpointing: must be false, {type(model).__name__} has no "
            "checkpointing in transformers"
        )


def _checkpoint_layers(model: Any) -> None:
    check_checkpointing(model)
    # the name since transformers 5.23, then that of the releases before
    new = getattr(model, "activation_checkpointing_enable", None)
    enable = new or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _four_bits(config: TrainConfig) -> dict[str, Any]:
    """NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, DTYPES[settle_dtype(config.dtype)])
    options = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization": options}
