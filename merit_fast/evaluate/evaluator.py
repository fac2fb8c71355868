"""Measures models one by one and keeps each result in files, so that a later run takes it over."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from merit_fast.evaluate.config import EvaluateConfig
from merit_fast.evaluate.items import ItemScores, read_items, write_items
from merit_fast.evaluate.measure import Measurer
from merit_fast.evaluate.models import BASE, JOINT, EvaluatedModels
from merit_fast.evaluate.weights import Interpolation, displacement
from merit_fast.manifests.atomic import link_file
from merit_fast.manifests.io import STAGE_FILE, read_manifest, write_manifest
from merit_fast.manifests.schemas import SCHEMA_VERSION, ArmResult
from merit_fast.model import load_model, without_router_logits
from merit_fast.progress import Task

_ITEMS_SUFFIX = ".items.safetensors"


class Evaluator:
    """Measures models and keeps each one's result and items in files."""

    def __init__(
        self,
        models: EvaluatedModels,
        measurer: Measurer,
        config: EvaluateConfig,
        directory: Path,
        task: Task,
        of_arms: Set[str],
    ) -> None:
        self.models = models
        self.measurer = measurer
        self.config = config
        self.directory = directory
        self.task = task
        self.of_arms = of_arms  # models whose retention is measured

    def measure(self, name: str) -> None:
        """Measures a model, and (1 - share) base + share model for every share of a joint run."""
        base = self.models.base
        path = self.models.path(name)
        start = self.models.starts.get(name)
        shares = self.models.shares(name, self.config)
        wanted = {name: 1.0, **{interpolated(name, share): share for share in shares}}
        missing = {key: share for key, share in wanted.items() if not self._file(key).exists()}
        for key in wanted.keys() - missing.keys():
            self.task.skip(self.measurer.num_tokens(retention=key in self.of_arms))
        if not missing:
            return
        model = load_model(str(path), self.config.dtype, None if start is None else str(start))
        without_router_logits(model)
        moved = 0.0 if name == BASE else displacement(path, base, start)
        line = Interpolation(model, base) if missing.keys() - {name} else None
        for key, share in missing.items():
            if line is not None and key != name:
                line.set(share)
            self._measure(key, model, share * moved)

    def _measure(self, name: str, model: nn.Module, displacement: float) -> None:
        if name in self.of_arms:
            result, items = self.measurer.measure(name, model, displacement, self.task)
            write_items(items, self._items_file(name))
        else:
            result = self.measurer.measure_rows(name, model, displacement, self.task)
        write_manifest(_Stored(result), self._file(name))

    def result(self, name: str) -> ArmResult:
        return read_manifest(_Stored, self._file(name)).result

    def items(self, name: str) -> ItemScores:
        return read_items(self._items_file(name))

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def _items_file(self, name: str) -> Path:
        return self.directory / f"{name}{_ITEMS_SUFFIX}"


@dataclass(frozen=True)
class _Stored:
    result: ArmResult
    schema_version: int = SCHEMA_VERSION


def interpolated(name: str, share: float) -> str:
    return f"{name}@{share:g}"


def members_of_arms(models: EvaluatedModels, shares: Sequence[float]) -> dict[str, tuple[str, ...]]:
    """Every arm with the names of its models: the base first, interpolations after joint."""
    arms = models.models_of_arms
    joint = {JOINT: arms[JOINT]} if JOINT in arms else {}
    names = models.interpolated
    between = {
        interpolated(JOINT, share): tuple(interpolated(name, share) for name in names)
        for share in (shares if names else ())
    }
    return {BASE: (BASE,), **joint, **between, **arms}


def take_results(folder: Path, directory: Path) -> None:
    """Links the results of one folder into another, unless these are there."""
    for file in sorted(folder.iterdir()):
        is_result = file.name.endswith((".json", _ITEMS_SUFFIX)) and file.name != STAGE_FILE
        if is_result and not (directory / file.name).exists():
            link_file(file, directory / file.name)
