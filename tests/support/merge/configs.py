"""Model directories with configs."""

import json
from pathlib import Path
from typing import Any


def config_of(directory: Path) -> Any:
    return json.loads((directory / "config.json").read_text())
