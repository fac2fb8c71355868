"""The configs that tell a loader how an output is quantised."""

import json
from pathlib import Path

from merit_fast.manifests.atomic import write_text
from merit_fast.merge.engine.prepare import Inputs
from merit_fast.merge.engine.quantise.forms import BlockForms
from merit_fast.merge.read.companions import CONFIG_FILE
from merit_fast.merge.read.files import copy_file, read_json
from merit_fast.merge.read.quantised.scheme import KEY, MODELOPT_FILE


def write_quantization(inputs: Inputs, directory: Path) -> None:
    """Makes the configs of an output agree with its quantised tensors.

    In the inputs' own form they are the inputs' configs. ``dtype`` fp8-block128 has a
    quantization_config of its own, for a model with config.json.
    """
    tensors = [tensor for file in inputs.files for tensor in file.tensors]
    if not any(tensor.is_quantised for tensor in tensors):
        return
    if not isinstance(inputs.forms, BlockForms):
        source = inputs.companions / MODELOPT_FILE
        if source.exists():
            copy_file(source, directory / MODELOPT_FILE)
        return
    file = directory / CONFIG_FILE
    if file.exists():
        values = read_json(file)
        text = values.get("text_config")
        for holder in (values, text if isinstance(text, dict) else {}):
            holder.pop(KEY, None)
            holder.pop("compression_config", None)
        described = ((tensor.name, tensor.shape, tensor.is_quantised) for tensor in tensors)
        values[KEY] = inputs.forms.config(described)
        write_text(file, json.dumps(values, indent=2) + "\n")
