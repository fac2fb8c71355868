"""Reading and running recipes, and expected values along the layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike
from support.merge.merges import load
from torch import Tensor

from merit_fast.integrations.mergekit.recipe import Recipe, merge_recipe, read_mergekit
from merit_fast.progress import SilentProgress

SMALL: dict[str, Any] = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=36,
    num_attention_heads=3,
    num_key_value_heads=1,
    num_hidden_layers=4,
    tie_word_embeddings=False,
    bos_token_id=None,
)


LAYERS = 4


def read(text: Any, tmp_path: Path, *assignments: str) -> Recipe:
    file = tmp_path / "r.yml"
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return read_mergekit(file, assignments)


def merged(text: Any, tmp_path: Path, *assignments: str) -> dict[str, Tensor]:
    merge_recipe(read(text, tmp_path, *assignments), tmp_path / "out", SilentProgress())
    return load(tmp_path / "out")


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def position(name: str, first: int = 0, depth: int = LAYERS) -> float:
    layer = layer_of(name)
    return 0.0 if layer is None else (layer - first) / (depth - 1) if depth > 1 else 1.0


def along(values: Sequence[float], t: float) -> float:
    return float(np.interp(t * (len(values) - 1), range(len(values)), values))


def assert_equal_to(found: Mapping[str, Tensor], truths: Mapping[str, ArrayLike]) -> None:
    """Allows 2 units in the last place of fp32: the formula may round once more."""
    assert set(found) == set(truths)
    for name, truth in truths.items():
        exact = np.asarray(truth).ravel()
        error = np.abs(found[name].double().numpy().ravel() - exact)
        assert (error <= 2.0**-22 * np.abs(exact) + 1e-9).all(), name
