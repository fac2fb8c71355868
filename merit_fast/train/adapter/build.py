"""Puts an adapter on a model, by PEFT."""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merit_fast.errors import InputError, one_line
from merit_fast.train.adapter.config import AdapterConfig
from merit_fast.train.adapter.targets import saved_modules, target_modules

_INITS = {"kaiming": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}


def require_peft(config: AdapterConfig) -> None:
    """Checks that the packages are there that the adapter needs.

    Raises:
        InputError: one is not.
    """
    packages = {"peft": "kind"} if config.is_on else {}
    if config.base == "4bit":
        packages["bitsandbytes"] = "base"
    for package, key in packages.items():
        if importlib.util.find_spec(package) is None:
            value = getattr(config, key)
            raise InputError(
                f"train.adapter.{key}: {value} needs the package {package}, which is not "
                f"installed; pip install {package}"
            )


def add_adapter(
    model: nn.Module, config: AdapterConfig, frozen: Sequence[str] = (), seed: int = 0
) -> Any:
    """Freezes the model's weights and puts an adapter on them, in place.

        y = x W^T + s * dropout(x) A^T B^T

    The adapter's weights are float32 where the model's are bfloat16. A depends only on the seed,
    so branches of one seed start alike.

    Args:
        model: a language model.
        config: the adapter's options.
        frozen: names of the parameters that ``train.freeze`` keeps; they get no adapter.
        seed: seed of A.

    Returns:
        The ``PeftModel`` around ``model``.

    Raises:
        InputError: a module to change does not exist or cannot have an adapter.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    chosen = target_modules(model, config, frozen)
    saved = saved_modules(model, config, frozen)
    both = sorted({*chosen} & {*saved})
    if both:
        raise InputError(f"train.adapter.modules_to_save: {both[0]} must not be a target too")
    options = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(chosen),
        modules_to_save=list(saved) or None,
        init_lora_weights=_INITS[config.init],  # type: ignore[arg-type]
        use_rslora=config.kind == "rslora",
        use_dora=config.kind == "dora",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            # tied weights are refused by name; the rest of PEFT's advice concerns other callers
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, options)  # type: ignore[arg-type]
    except ValueError as error:
        raise InputError(f"train.adapter: {one_line(error)}") from None
    wrapped = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    unwanted = sorted(wrapped ^ {*chosen})
    if unwanted:
        raise InputError(f"train.adapter.targets: must tell {unwanted[0]} from modules like it")
    return adapted


def check_adapter(base: Path, config: AdapterConfig, freeze: tuple[str, ...] | None) -> int:
    """Puts the adapter on an empty model of the base's config.

    Returns:
        Number of parameters that the adapter trains.

    Raises:
        InputError: see ``require_peft`` and ``add_adapter``.
    """
    from merit_fast.model import freeze_parameters, make_empty_model

    require_peft(config)
    model = make_empty_model(str(base))
    frozen = freeze_parameters(model, freeze)
    with torch.device("meta"):
        add_adapter(model, config, frozen)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
