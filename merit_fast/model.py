"""Loads models, takes their fingerprints and measures their losses on target tokens.

Every stage that runs a model uses it.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from merit_fast.errors import InputError, one_line
from merit_fast.manifests.hashes import checksum

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merit_fast.data import Batch

Dtype = Literal["auto", "bf16", "fp32"]
SettledDtype = Literal["bf16", "fp32"]
DTYPES: dict[SettledDtype, str] = {"bf16": "bfloat16", "fp32": "float32"}  # names in torch
_SHORT_TOKENS = 512


class TargetLosses(NamedTuple):
    """Losses of a batch's M target tokens, in batch order."""

    loss: "Tensor"  # [M] float32, nats
    correct: "Tensor"  # [M] bool: the target is the greedy choice
    example: "Tensor"  # [M] int64: row of the batch, or index in a packed row


def load_model(path: str, dtype: Dtype) -> "nn.Module":
    """Loads a causal LM in evaluation mode, on the GPU if there is one.

    Args:
        path: directory or hub id.
        dtype: "bf16", "fp32" or "auto".

    Raises:
        InputError: transformers cannot load a causal LM from the path.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with no_loading_bar():
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, DTYPES[settle_dtype(dtype)])
            )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: is not a causal language model that transformers can load: {one_line(error)}"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: nn.Module = model.eval().to(device)  # type: ignore[no-untyped-call]
    return loaded


def target_losses(
    model: "nn.Module", batch: "Batch", plain_attention: bool = False
) -> TargetLosses:
    """Cross-entropy of every target token (label != -100, after the shift), in float32.

        logits = model(...).logits[:, :-1].float()
        loss = F.cross_entropy(logits[mask], labels[:, 1:][mask])

    Only the last ``batch.logits_to_keep`` positions go through the head, if the model's forward has
    an argument for it. ``plain_attention`` chooses attention whose gradient has a gradient.
    """
    import torch

    from merit_fast.data import PackedBatch

    inputs, targets = model_inputs(model, batch, plain_attention)
    loss, correct, row, column = score_targets(model(**inputs).logits, targets)
    if isinstance(batch, PackedBatch):
        first = batch.input_ids.shape[1] - targets.shape[1] - 1
        row = torch.bucketize(column + first, batch.cu_seqlens[1:].to(row.device), right=True)
    return TargetLosses(loss, correct, row)


def score_targets(logits: "Tensor", targets: "Tensor") -> "tuple[Tensor, Tensor, Tensor, Tensor]":
    """Scores the M targets (not -100) among ``targets`` [B, n] of the last n + 1 positions.

    Returns:
        Losses [M] in float32, whether each target is the greedy choice [M], and the rows and the
        columns [M] of ``targets`` at which they stand.
    """
    import torch
    from torch.nn import functional as F

    mask = targets != -100
    chosen = logits[:, -targets.shape[1] - 1 : -1][mask].float()  # [M, V]
    row, column = torch.nonzero(mask, as_tuple=True)
    targets = targets[mask]
    loss = F.cross_entropy(chosen, targets, reduction="none")
    return loss, chosen.detach().argmax(-1) == targets, row, column


def model_inputs(
    model: "nn.Module", batch: "Batch", plain_attention: bool = False
) -> "tuple[dict[str, Any], Tensor]":
    """Arguments of the model's forward, and targets [B, n] of its positions ``[-n - 1 : -1]``.

    A packed row has no mask: transformers makes a block-diagonal one from restarting positions.
    """
    from merit_fast.data import PackedBatch

    device = next(model.parameters()).device
    width = batch.input_ids.shape[1]
    _choose_attention(model, device.type, 0 if plain_attention else width)
    keep = min(-(-batch.logits_to_keep // 8) * 8, width)  # few shapes: each costs a kernel's set-up
    accepted = inspect.signature(model.forward).parameters
    optional: dict[str, Any] = {
        "logits_to_keep": keep,
        "position_ids": batch.position_ids.to(device),
        "use_cache": False,
    }
    inputs = {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": None
        if isinstance(batch, PackedBatch)
        else batch.attention_mask.to(device),
        **{name: value for name, value in optional.items() if name in accepted},
    }
    return inputs, batch.labels[:, -keep + 1 :].to(device)


def _choose_attention(model: "nn.Module", device_type: str, width: int) -> None:
    """Sets plain attention for short batches on a CPU, and for width 0 on any device.

    On a CPU torch's fused attention takes twice the time of plain attention on short rows.
    """
    if (device_type != "cpu" and width) or not hasattr(model, "set_attn_implementation"):
        return
    wanted = "eager" if width <= _SHORT_TOKENS else "sdpa"
    if model.config._attn_implementation != wanted:  # type: ignore[union-attr]
        try:
            model.set_attn_implementation(wanted)  # type: ignore[operator]
        except ValueError:  # the architecture lacks this attention and keeps its default
            return


def settle_dtype(dtype: Dtype) -> SettledDtype:
    """Replaces "auto" by bf16 where this machine multiplies it fast, and by fp32 elsewhere.

    On a CPU without bf16 instructions, bf16 products take hundreds of times as long as fp32
    products (measured with AVX2).
    """
    if dtype != "auto":
        return dtype
    fast = _cpu_multiplies_bf16(Path("/proc/cpuinfo")) or _gpu_multiplies_bf16()
    return "bf16" if fast else "fp32"


def _cpu_multiplies_bf16(cpuinfo: Path) -> bool:
    """Whether the CPU lists bf16 instructions; a run that is up to date imports no torch to ask."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    flags = next(lines, "").split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def _gpu_multiplies_bf16() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def resolve_model(path: str) -> Path:
    """Local directory of a model: ``path`` itself, or the hub's snapshot, downloaded if necessary.

    Raises:
        InputError: the path is neither, or a directory without config.json.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(f"{folder}: is not a model directory: it has no config.json")
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds, for an unavailable model
        raise InputError(
            f"model: {path!r} is neither a directory nor an available hub id: {one_line(error)}"
        ) from None


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


def peak_memory_bytes() -> int:
    """Highest resident memory of this process since ``reset_peak_memory`` (or its start)."""
    import resource

    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Resets the peak where the system allows it (Linux)."""
    clear = Path("/proc/self/clear_refs")
    if os.access(clear, os.W_OK):
        clear.write_text("5")


def keep_freed_memory() -> None:
    """Lets glibc keep 256 MiB that torch frees, which saves training a page fault per 4 KiB."""
    import ctypes

    trim_threshold = -1  # M_TRIM_THRESHOLD of malloc.h
    mmap_threshold = -3  # M_MMAP_THRESHOLD
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another C library: nothing to tune
    mallopt(mmap_threshold, 128 << 20)
    mallopt(trim_threshold, 256 << 20)


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Silences transformers' progress bars for loading and saving, so that only ours is shown."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
