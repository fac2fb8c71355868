"""Writes a trained adapter as PEFT's own folder."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from merit_fast.manifests.atomic import write_text

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def write_adapter(adapted: Any, start_path: str, directory: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; the same run gives the same bytes.

    Args:
        adapted: the ``PeftModel``.
        start_path: the model that the adapter belongs to; adapter_config.json names it.
        directory: the branch's folder.
    """
    from peft import get_peft_model_state_dict

    # PEFT would ask the hub for the base's vocabulary to decide whether embeddings are saved
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / WEIGHTS_FILE, {"format": "pt"})
    config = adapted.peft_config["default"]
    config.inference_mode = True
    config.base_model_name_or_path = start_path
    config.save_pretrained(str(directory))
    values = json.loads((directory / CONFIG_FILE).read_text())
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])  # PEFT keeps sets, whose order changes
    write_text(directory / CONFIG_FILE, json.dumps(values, indent=2, sort_keys=True) + "\n")
