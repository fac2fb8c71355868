"""Files of a checkpoint: its folder, its weights and its fingerprint."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.manifests.hashes import checksum

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def resolve_model(path: str, revision: str | None = None) -> Path:
    """Local directory of a model: ``path`` itself, or the hub's snapshot, downloaded if necessary.

    Args:
        path: a folder or a hub id.
        revision: a branch, tag or commit of the hub id; None: its main branch.

    Raises:
        InputError: the path is neither, or a directory without config.json.
    """
    from merit_fast.data.paths import hub_trouble, is_hub_id

    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(f"{folder}: is not a model directory: it has no config.json")
        return folder
    if not is_hub_id(path):
        state = "a file" if folder.exists() else "not there"
        raise InputError(f"model: {path}: must be a model's folder or a hub id; it is {state}")
    from huggingface_hub import snapshot_download

    patterns = [
        "*.json",
        "*.safetensors",
        "*.model",
        "*.txt",
        "*.jinja",
    ]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds, for an unavailable model
        name = f"{path}@{revision}" if revision else path
        raise InputError(f"model: {name}: not a folder, and {hub_trouble(error)}") from None


def copy_processor_files(start: Path, directory: Path) -> None:
    """Copies the files of a model's processor, byte for byte, into a model made from it.

    Args:
        start: the model's folder; one that reads no images has none of them.
        directory: an output directory; a file that it has already stays.
    """
    for name in PROCESSOR_FILES:
        if (start / name).is_file() and not (directory / name).exists():
            shutil.copyfile(start / name, directory / name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a checkpoint's index names, or its only one.

    Raises:
        InputError: it has neither, or its index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if (folder / "model.safetensors").exists():
            return [folder / "model.safetensors"]
        raise InputError(f"{folder}: has neither {index.name} nor model.safetensors")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: weight_map: must map tensors to files") from None
    return [folder / Path(str(name)).name for name in sorted(names)]


def model_fingerprint(folder: Path, file_hash: Callable[[Path], str] = checksum) -> str:
    """32 hex digits of a checkpoint: of its config, and of the whole of every weight file.

    Args:
        folder: the checkpoint.
        file_hash: the hash of a file's whole content.
    """
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.is_file()):  # a pipe would block
        if file.name in ("config.json", "adapter_config.json"):
            config = json.loads(file.read_text())
            config.pop("_name_or_path", None)
            digest.update(json.dumps(config, sort_keys=True).encode())
        elif file.suffix in (".safetensors", ".bin"):
            digest.update(f"{file.name}\n{file.stat().st_size}\n{file_hash(file)}\n".encode())
    return digest.hexdigest()[:32]
