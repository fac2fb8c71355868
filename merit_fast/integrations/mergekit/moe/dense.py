"""The dense models of a mixture's recipe: where they are, their tensors and configs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merit_fast.errors import InputError, show
from merit_fast.integrations.mergekit.document import Reference
from merit_fast.integrations.mergekit.moe.document import MoeDocument
from merit_fast.integrations.mergekit.recipe import locate
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.companions import CONFIG_FILE
from merit_fast.merge.read.decoded import read_input
from merit_fast.merge.read.files import read_json
from merit_fast.merge.read.remote import Location


@dataclass(frozen=True)
class Dense:
    """One dense model of the recipe: where it is, its tensors and config.json."""

    path: Location
    checkpoint: Checkpoint
    config: Mapping[str, Any]


def read_models(document: MoeDocument) -> dict[Reference, Dense]:
    """Every model of the recipe, the base first; adapters put on their models.

    Raises:
        InputError: one is absent or damaged; names its key.
    """
    models: dict[Reference, Dense] = {}
    experts = [*document.experts, *document.shared]
    for reference in (document.base, *(expert.source for expert in experts)):
        if reference not in models:
            models[reference] = _read_model(document, reference)
    return models


def _read_model(document: MoeDocument, reference: Reference) -> Dense:
    try:
        path = locate(reference.model)
        checkpoint = read_input(path, None)
        config = read_json(path / CONFIG_FILE)
        if reference.lora:
            path = locate(reference.lora)
            checkpoint = read_input(path, checkpoint)
    except InputError as error:
        raise document.error(reference.key, str(error).removeprefix("model: ")) from None
    return Dense(path, checkpoint, config)


def model_types(document: MoeDocument, models: Mapping[Reference, Dense]) -> dict[str, str]:
    """The model_type of every model, by the key of the recipe that names it."""
    experts = [*document.experts, *document.shared]
    references = {"base_model": document.base}
    references |= {f"{expert.key}.source_model": expert.source for expert in experts}
    return {key: str(models[item].config.get("model_type")) for key, item in references.items()}


def number_in(dense: Dense, key: str) -> int:
    """A positive number of a model's config.json; InputError if it is none."""
    value = dense.config.get(key)
    if type(value) is not int or value < 1:
        rule = f"must be a number of at least 1, got {show(value)}"
        raise InputError(f"{dense.path / CONFIG_FILE}: {key}: {rule}")
    return value
