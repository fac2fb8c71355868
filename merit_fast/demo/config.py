"""The demo as an ordinary run: its model, its tasks and its YAML."""

from pathlib import Path
from typing import Any

import yaml

from merit_fast.demo.model import default_cache, prepare_model
from merit_fast.demo.tasks import prepare_mixture
from merit_fast.manifests.atomic import write_text


def write_demo(output: Path, *, quick: bool, include_copyleft: bool = False) -> Path:
    """Prepares model (in the cache) and mixture (in ``output``), writes demo.yml, returns its path.

    The same call writes the same bytes, so a second demo finds every stage up to date.

    Raises:
        MeritFastError: the demo extra is not installed; names the command that installs it.
    """
    model = prepare_model(default_cache())
    mixture = prepare_mixture(
        output.resolve() / "mixture", quick=quick, include_copyleft=include_copyleft
    )
    split: dict[str, Any] = {"groups": 4, "preset": "paper", "examples": 8}
    evaluate: dict[str, Any] = {"interpolate": [0.5], "max_new_tokens": 32}
    controls: dict[str, Any] = {"joint": True, "random": 1, "iid": 0}
    if quick:
        controls = {"joint": True}
        split |= {"groups": 2, "proj_dim": 16384}
        evaluate = {"interpolate": [], "max_new_tokens": 12}
    config: dict[str, Any] = {
        "model": str(model),
        "mixture": mixture,
        "split": split,
        "train": {
            "epochs": 1,
            "learning_rate": 1.0e-4,
            "batch_size": 8,
            "controls": controls,
        },
        "merge": {"weights": "tokens"},
        "evaluate": evaluate,
        "output": ".",  # the folder of the YAML
    }
    file = output / "demo.yml"
    write_text(file, yaml.safe_dump(config, sort_keys=False))
    return file
