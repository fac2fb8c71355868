"""The class that a config.json names, the models inside it, and the rules for its files."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from merit_fast.merge.read.files import folder_of, list_directory, read_json
from merit_fast.merge.read.names.rules import LEGACY, Rule, conversion_map, rules_of
from merit_fast.merge.read.remote import Location
from merit_fast.records import record, replace

_CONFIG_FILE = "config.json"
# Language models of multimodal models, and the plain ones that have the same tensors.
_SAME_TENSORS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}


@record
class Submodel:
    """A model inside a model. ``section``: the key of its config in config.json, or ""."""

    path: str
    class_name: str
    model_type: str
    section: str
    is_free: bool  # the section's model_type chooses the class


@record
class ModelClass:
    """A class of transformers with the models of one config.json.

    ``roots``: first parts of its parameters' names; () for a class that is not known.
    ``inner_roots``: those of the names below ``prefix``.
    """

    name: str
    model_type: str
    config: Mapping[str, Any]
    prefix: str = ""
    submodels: tuple[Submodel, ...] = ()
    roots: frozenset[str] = frozenset()
    inner_roots: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()  # names in memory, numberless, that a rule would change
    ties_by_default: bool = False  # what an absent tie_word_embeddings means

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of all its models in order, as transformers collects them."""
        found: list[Rule] = []
        seen: defaultdict[str, list[str]] = defaultdict(list)
        for submodel in self.submodels:
            by_class = rules_of(submodel.class_name)
            by_type = by_class is None and not _is_under(submodel.path, seen[submodel.model_type])
            rules = rules_of(submodel.model_type) if by_type else by_class
            if rules is None or _is_under(submodel.path, seen[submodel.class_name]):
                continue
            scope = submodel.path.removeprefix(self.prefix).removeprefix(".")
            in_scope = (replace(rule, scope=scope, prefix=self.prefix) for rule in rules)
            found += in_scope if submodel.path else rules
            seen[submodel.class_name].append(submodel.path)
            if by_type:
                seen[submodel.model_type].append(submodel.path)
        return (*found, *(rules_of(LEGACY) or ()))

    @property
    def text_path(self) -> str | None:
        """Path of the language model inside a multimodal model; None where there is none."""
        paths = [model.path for model in self.submodels if model.section == "text_config"]
        return paths[0] if paths and paths[0] else None

    @property
    def ties_head(self) -> bool:
        """Whether the output head is the input embedding, by the config."""
        text = self.config.get("text_config")
        sections = (self.config, text if isinstance(text, dict) else {})
        stated = [section.get("tie_word_embeddings") for section in sections]
        return next((value for value in stated if isinstance(value, bool)), self.ties_by_default)

    def with_prefix(self, name: str) -> str:
        """A renamed name with the prefix of the base model added or taken away, as it has one."""
        if not self.prefix or not self.roots:
            return name
        first, _, rest = name.partition(".")
        has_base = self.prefix in self.roots
        inner = rest.partition(".")[0]
        if first == self.prefix and inner in self.roots:
            return name if has_base and inner in self.inner_roots else rest
        is_of_base = has_base and first not in self.roots and first in self.inner_roots
        return f"{self.prefix}.{name}" if is_of_base else name


def model_class(path: Location) -> ModelClass:
    """The class of a model, by its config.json; one without rules where it has none.

    Raises:
        InputError: config.json cannot be read.
    """
    folder = folder_of(path)
    has_config = _CONFIG_FILE in list_directory(folder)
    return class_of_config(read_json(folder / _CONFIG_FILE) if has_config else {})


def class_of_config(config: Mapping[str, Any]) -> ModelClass:
    """The class that ``architectures`` names first, else the headless class of ``model_type``."""
    listed = config.get("architectures")
    model_type = str(config.get("model_type", ""))
    headless = conversion_map()["text_models"].get(model_type, "")
    name = listed[0] if isinstance(listed, list) and listed else headless
    entry = conversion_map()["classes"].get(name) if isinstance(name, str) else None
    if entry is None:
        root = Submodel("", str(name), model_type, "", False)
        return ModelClass(str(name), model_type, config, submodels=(root,))
    submodels = tuple(_submodels(entry, config))
    return ModelClass(
        name,
        model_type or submodels[0].model_type,
        config,
        entry["prefix"],
        submodels,
        frozenset(entry["roots"]),
        frozenset(entry.get("inner", ())),
        frozenset(entry.get("kept", ())),
        entry.get("tied", False),
    )


def is_language_model_of(text: ModelClass, whole: ModelClass) -> bool:
    """Whether a class is the language model inside a multimodal one."""
    inside = {model.model_type for model in whole.submodels if model.path == whole.text_path}
    inside |= {_SAME_TENSORS[name] for name in inside if name in _SAME_TENSORS}
    return whole.text_path is not None and text.model_type in inside


def are_siblings(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether one config is of the language model inside the other's multimodal model."""
    one = class_of_config(first)
    other = class_of_config(second)
    return is_language_model_of(one, other) or is_language_model_of(other, one)


def _submodels(entry: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Submodel]:
    """The models of a class; where a section of the config asks for another class, that one's."""
    replaced: list[str] = []
    for path, class_name, model_type, section, is_free in entry["models"]:
        if _is_under(path, replaced):
            continue
        asked = config.get(section) if is_free else None
        asked_type = asked.get("model_type") if isinstance(asked, dict) else None
        other = conversion_map()["text_models"].get(asked_type) if asked_type else None
        if other is None or asked_type == model_type:
            yield Submodel(path, class_name, model_type, section, is_free)
            continue
        replaced.append(path)
        yield Submodel(path, other, str(asked_type), section, is_free)
        inside = conversion_map()["classes"].get(other, {}).get("models", ())
        for inner, inner_class, inner_type, *_ in inside[1:]:
            yield Submodel(f"{path}.{inner}", inner_class, inner_type, "", False)


def _is_under(path: str, seen: list[str]) -> bool:
    return any(above == "" or path.startswith(f"{above}.") for above in seen)
