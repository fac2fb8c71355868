"""ms-swift's own questions: which kind of model it sees, and where our plugin stands."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from merit_fast.engines.asking import ask
from merit_fast.engines.stacks import python_of
from merit_fast.errors import InputError, show
from merit_fast.integrations.swift import PLUGIN_FILE
from merit_fast.train.config import TrainConfig

_CALLBACK = "merit"
_UNKNOWN = "dummy"  # ms-swift's template of a model that it does not know
# The arguments are the model's folder, and the user's model_type and template or "".
_SCRIPT = """
import sys
from swift.model import get_model_info_meta
from swift.template import get_template_meta
folder, kind, template = (word or None for word in sys.argv[1:])
answer = {}
try:
    info, meta = get_model_info_meta(folder, model_type=kind)
    answer["model_type"] = meta.model_type
    answer["template"] = get_template_meta(info, meta, template_type=template).template_type
except ValueError as error:
    answer["error"] = str(error)
"""


def check_swift(train: TrainConfig, user: Mapping[str, Any], base: str) -> None:
    """Checks that ms-swift knows the model and its template, packs here, and saves what it trains.

    Args:
        train: the recipe.
        user: the keys of ``engine_config``; empty without one.
        base: folder of the run's model.

    Raises:
        InputError: it does not.
    """
    import torch

    if train.packing and train.engine_config is None and not torch.cuda.is_available():
        raise InputError(
            "train.packing: must be false with engine swift on a CPU: ms-swift packs with flash "
            "attention only"
        )
    if user.get("save_strategy") == "no":
        raise InputError(
            f"{train.engine_config}: save_strategy: must be steps or epoch, got 'no': ms-swift "
            "saves a model in checkpoints only"
        )
    _kind_of(train, user, base)


def swift_keys(
    train: TrainConfig, user: Mapping[str, Any] | None, base: str
) -> dict[str, str | list[str]]:
    """Keys of a branch: the kind of its model, and our plugin next to the user's own.

    Raises:
        InputError: ms-swift does not know the model or its template.
    """
    keys: dict[str, str | list[str]] = {**_kind_of(train, user or {}, base)}
    for name, value in (("external_plugins", str(PLUGIN_FILE)), ("callbacks", _CALLBACK)):
        given = (user or {}).get(name) or []
        listed = [given] if isinstance(given, str) else [str(item) for item in given]
        keys[name] = [*(item for item in listed if item != value), value]
    return keys


def _kind_of(train: TrainConfig, user: Mapping[str, Any], folder: str) -> dict[str, str]:
    """The model_type and template under which ms-swift trains a model.

    ms-swift tells them by the folder's name or the architecture. Where it knows no template it
    would train with one that has no turns, and say nothing.

    Raises:
        InputError: it cannot tell, so that ``engine_config`` must.
    """
    given = [str(user.get(key) or "") for key in ("model_type", "template")]
    answer = _ask(python_of(train), folder, *given)
    file = train.engine_config or "train.engine_config"
    if "error" in answer:
        raise InputError(f"{file}: model_type and template: ms-swift: {answer['error']}")
    if answer["template"] in (None, _UNKNOWN):
        raise InputError(
            f"{file}: template: must name the template of {folder}, which ms-swift does not know, "
            f"got {show(user.get('template'))}"
        )
    return {key: value for key, value in answer.items() if value}


@functools.cache
def _ask(python: str, *words: str) -> Mapping[str, Any]:
    answer: Mapping[str, Any] = ask("swift", python, _SCRIPT, *words)
    return answer
