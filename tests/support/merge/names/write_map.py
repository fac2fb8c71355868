"""Writes merit_fast/merge/read/names/map.json from the installed transformers.

    python tests/support/merge/names/write_map.py

The file holds transformers' conversion rules and, for every class that a config.json may name, the
models inside it and the first parts of its parameters' names. Models are built without weights.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[4]
MAP_FILE = ROOT / "merit_fast" / "merge" / "read" / "names" / "map.json"
_DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
    "depth", "num_encoder_layers", "num_decoder_layers", "vision_layers", "audio_layers",
)  # fmt: skip
_SIZES = {"head_dim": 64, "num_key_value_heads": 4, "vocab_size": 1000}


def describe_all(names: list[str] | None = None) -> dict[str, Any]:
    """The whole content of the map; ``names``: only these classes."""
    import transformers

    classes = {}
    for name in names or sorted(class_names()):
        described = describe_class(name)
        if described is not None:
            classes[name] = described
    return {
        "transformers": transformers.__version__,
        "rules": describe_rules(),
        "text_models": text_models(),
        "classes": classes,
    }


def class_names() -> set[str]:
    """Every class of transformers that a config.json can name in ``architectures``."""
    import transformers
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for table, classes in vars(modeling_auto).items():
        if table.endswith("MAPPING_NAMES"):
            for entry in classes.values():
                found.update([entry] if isinstance(entry, str) else filter(None, entry))
    return {
        name
        for name in found
        if isinstance(getattr(transformers, name, None), type)
        and issubclass(getattr(transformers, name), transformers.PreTrainedModel)
    }


def text_models() -> dict[str, str]:
    """model_type -> class without a head, for the configs inside a config."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return {
        key: value if isinstance(value, str) else value[0]
        for key, value in sorted(MODEL_MAPPING_NAMES.items())
    }


def describe_class(name: str) -> dict[str, Any] | None:
    """The models inside a class and its names; None where transformers cannot build its default."""
    import transformers

    model_class = getattr(transformers, name)
    for depth in (2, None):
        try:
            config = model_class.config_class()
            settle(config, depth)
            return describe_model(build(model_class, config))
        except Exception as error:
            print(f"{name}: {error!r}"[:100])
    return None


def build(model_class: Any, config: Any) -> Any:
    """A model without weights."""
    import torch

    with torch.device("meta"):
        return model_class._from_config(config)


def describe_model(model: Any) -> dict[str, Any]:
    """The entry of a model's class."""
    from transformers import AutoConfig, PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    configs = {id(value): key for key, value in vars(model.config).items()}
    headless = text_models()
    free = {key for key, kind in model.config.sub_configs.items() if kind is AutoConfig}
    models = [
        [
            path,
            type(part).__name__,
            part.config.model_type,
            key := configs.get(id(part.config), ""),
            key in free and headless.get(part.config.model_type) == type(part).__name__,
        ]
        for path, part in model.named_modules()
        if isinstance(part, PreTrainedModel)
    ]
    names = model.state_dict()
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: Any = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    renamed = {
        name: rename_source_key(name, renamings, converters, prefix, names)[0] for name in names
    }
    changed = {name: new for name, new in renamed.items() if new != name}
    kept = {numberless(name) for name, new in changed.items() if new not in names}
    described: dict[str, Any] = {
        "prefix": prefix,
        "models": models,
        "roots": _roots(names, ""),
    }
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        described["tied"] = True
    if inner := _roots(names, f"{prefix}."):
        described["inner"] = inner
    if kept:
        described["kept"] = sorted(kept)
    return described


def _roots(names: Iterable[str], prefix: str) -> list[str]:
    """First parts of the names below a prefix."""
    below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return sorted({name.partition(".")[0] for name in below})


def numberless(name: str) -> str:
    """A tensor's name with # for every number between dots."""
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def describe_rules() -> dict[str, Any]:
    """Rules by class name or model_type; a text stands for the rules of another key."""
    from transformers import conversion_mapping

    rules: dict[str, Any] = {}
    aliases = conversion_mapping._MODEL_TO_CONVERSION_PATTERN
    build: Any = conversion_mapping._build_checkpoint_conversion_mapping
    built = build()
    for key, transforms in sorted(built.items()):
        described = [describe_rule(transform) for transform in transforms]
        alias = aliases.get(key)
        same = alias in built and described == [describe_rule(rule) for rule in built[alias]]
        rules[key] = alias if same else described
    return rules


def describe_rule(transform: Any) -> dict[str, Any]:
    """One rule: the patterns that are searched for, and what a match becomes."""
    described: dict[str, Any] = {
        "kind": type(transform).__name__,
        "sources": transform.source_patterns,
        "targets": transform.target_patterns,
    }
    if hasattr(transform, "offset"):
        described["offset"] = transform.offset
    if hasattr(transform, "operations"):
        described["operations"] = [
            {"kind": type(operation).__name__} | vars(operation)
            for operation in transform.operations
        ]
    return described


def settle(config: Any, depth: int | None) -> None:
    """Bounds the number of layers and fills sizes without which a model cannot be built."""
    from transformers import PretrainedConfig

    for key in _DEPTHS if depth else ():
        if isinstance(getattr(config, key, None), int) and getattr(config, key) > depth:
            setattr(config, key, depth)
    for key, size in _SIZES.items():
        if hasattr(config, key) and getattr(config, key) is None:
            setattr(config, key, size)
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            settle(value, depth)


def map_text(content: dict[str, Any]) -> str:
    """The file's text: one line for each rule's key and each class."""
    lines = ["{"]
    for section in ("rules", "text_models", "classes"):
        rows = [
            f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content[section].items()
        ]
        lines.append(f'"{section}": {{\n' + ",\n".join(rows) + "\n},")
    lines.append(f'"transformers": {json.dumps(content["transformers"])}')
    return "\n".join([*lines, "}"]) + "\n"


if __name__ == "__main__":
    MAP_FILE.write_text(map_text(describe_all()))
