"""The keys that a stack reads from a configuration, asked in its own environment."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from merit_fast.engines.asking import ask
from merit_fast.errors import InputError
from merit_fast.train.stack.options import Engine

_DATACLASSES = """
import dataclasses
names = {field.name for cls in classes for field in dataclasses.fields(cls)} | {"env"}
"""
_SORT = """
answer = sorted(names)
"""
# Python that sets ``names``; the configuration's file is the first argument.
_SCRIPTS: Mapping[Engine, str] = {
    "trl": f"""
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig
classes = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
{_DATACLASSES}""",
    "llamafactory": f"""
from llamafactory.hparams.parser import _TRAIN_ARGS as classes
{_DATACLASSES}""",
    "swift": f"""
from swift.arguments import SftArguments
classes = (SftArguments,)
{_DATACLASSES}names.add("ENV")
""",
    "axolotl": """
import sys, yaml
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.config import merge_input_args
from axolotl.utils.dict import DictDefault
with open(sys.argv[1], encoding="utf-8") as file:
    prepare_plugins(DictDefault({"plugins": yaml.safe_load(file).get("plugins")}))
_, config = merge_input_args()
names = set(config.model_fields)
names |= {field.alias for field in config.model_fields.values() if field.alias}
""",
}


def check_keys(engine: Engine, python: str, file: str, values: Mapping[str, Any]) -> None:
    """Checks that the stack reads every key: axolotl drops others without a word.

    Raises:
        InputError: a key is unknown; the nearest is named.
        MeritFastError: the stack's environment fails before it tells its keys.
    """
    known = set(ask(engine, python, _SCRIPTS[engine] + _SORT, file))
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise InputError(f"{file}: {key}: {engine} has no such key{hint}")
