"""Model directories with configs."""

import json


def config_of(directory):
    return json.loads((directory / "config.json").read_text())
