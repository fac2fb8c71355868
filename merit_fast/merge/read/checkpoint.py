"""Sharded safetensors, read from headers only: names, dtypes, shapes and byte ranges, all checked.

No name in an index leads out of its directory.
"""

import shlex
from collections.abc import Mapping, Sequence

from merit_fast.errors import InputError
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.files import (
    folder_of,
    is_weight_file,
    list_directory,
    quote,
    read_json,
)
from merit_fast.merge.read.headers import check_name, read_header
from merit_fast.merge.read.names.weight_files import ADAPTER_FILE as ADAPTER_FILE
from merit_fast.merge.read.names.weight_files import INDEX_FILE as INDEX_FILE
from merit_fast.merge.read.names.weight_files import SINGLE_FILE as SINGLE_FILE
from merit_fast.merge.read.names.weight_files import weight_files
from merit_fast.merge.read.remote import Location
from merit_fast.records import field, record, replace

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@record
class Checkpoint:
    """A model's directory or file: its tensors, and which file holds which, in file order.

    ``notes``: sentences for the summary about what was changed while it was read.
    """

    path: Location
    tensors: Mapping[str, TensorEntry]
    shards: tuple[tuple[str, tuple[str, ...]], ...]  # (file name, tensor names by offset)
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def is_distributed(self) -> bool:
        """Whether the tensors lie in chunks."""
        return False

    def described_files(self) -> set[Location]:
        """Files that decide an output and hold none of its tensors."""
        return set()

    def names_left_out(self, keeps_values: bool) -> tuple[str, ...]:
        """Names of the checkpoint that are no tensors of the model, and that an output lacks.

        Args:
            keeps_values: the output keeps values of the model that are no tensors, as another
                distributed checkpoint does.
        """
        return ()


def read_checkpoint(path: Location) -> Checkpoint:
    """Reads the headers of a model: a safetensors file, or a directory of them.

    In a directory an index counts first, then model.safetensors, then what ``weight_files`` finds.

    Raises:
        InputError: a rule of the format is broken; the message names file, tensor, rule and value.
    """
    if is_weight_file(path):
        return replace(read_files(folder_of(path), [path.name]), path=path)
    present = list_directory(path)
    found = weight_files(path, present)
    if found is None:
        raise InputError(
            f"{path}: holds neither {INDEX_FILE} nor {SINGLE_FILE}{_hint(path, present)}"
        )
    notes = (found.note,) if found.note else ()
    if found.index is None:
        return replace(read_files(path, found.files), notes=notes)
    index = path / found.index
    weight_map = _read_weight_map(index)
    files = sorted(set(weight_map.values()))
    if SINGLE_FILE in present and SINGLE_FILE not in files:
        raise InputError(
            f"{index}: does not name {SINGLE_FILE}, which is next to it; remove the stale one"
        )
    checkpoint = read_files(path, files)
    _check_index(index, weight_map, checkpoint.tensors)
    return replace(checkpoint, notes=notes)


def read_files(path: Location, files: Sequence[str]) -> Checkpoint:
    """The tensors of these safetensors files of a directory, whatever else it holds.

    Raises:
        InputError: as ``read_checkpoint``; also where a tensor is in two files, or there is none.
    """
    tensors: dict[str, TensorEntry] = {}
    shards = []
    for name in files:
        entries = read_header(path / name)
        for entry in entries:
            if entry.name in tensors:
                raise InputError(
                    f"{path / name}: {entry.name}: is in {tensors[entry.name].file.name} too"
                )
            tensors[entry.name] = entry
        shards.append((name, tuple(entry.name for entry in entries)))
    if not tensors:
        raise InputError(f"{path}: {', '.join(files)}: holds no tensor")
    return Checkpoint(path, tensors, tuple(shards))


def _read_weight_map(index: Location) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{index}: weight_map: must be a mapping of tensor to file, got {quote(weight_map)}"
        )
    for tensor, name in weight_map.items():
        check_name(index, tensor)
        plain = isinstance(name, str) and name.isprintable() and not {"/", "\\"} & set(name)
        if not plain or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: {tensor}: must name a .safetensors file of this directory, got "
                f"{quote(name)}"
            )
    return weight_map


def _check_index(
    index: Location, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise InputError(f"{index}: {name}: is not in {file}")
        if tensors[name].file.name != file:
            raise InputError(f"{index}: {name}: must be in {file}, is in {tensors[name].file.name}")
    for name, entry in tensors.items():
        if name not in weight_map:
            raise InputError(f"{index}: {name}: is in {entry.file.name} but not in the index")


def pickle_hint(path: Location, present: Sequence[str]) -> str:
    """Hint for a directory without safetensors: the command that writes them, or ""."""
    pickles = sorted(
        (name for name in present if name.endswith(_PICKLES)), key=lambda name: "_model" not in name
    )
    if not pickles:
        return ""
    first = pickles[0]
    command = ""
    if first.startswith("pytorch_model"):
        command = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({str(path)!r}, dtype='auto').save_pretrained({str(path)!r})"
        )
    elif first == "adapter_model.bin":
        command = (
            "import torch; from safetensors.torch import save_file; "
            f"t = torch.load({str(path / first)!r}, map_location='cpu', weights_only=True); "
            f"save_file({{n: v.clone() for n, v in t.items()}}, {str(path / ADAPTER_FILE)!r})"
        )
    remedy = (
        f"convert it: python -c {shlex.quote(command)}" if command else "only safetensors are read"
    )
    return f"; {quote(first)[1:-1]} is a pickle file, which can run code when it is read; {remedy}"


def _hint(path: Location, present: Sequence[str]) -> str:
    """Hint for a directory whose weights are in another form."""
    if ADAPTER_FILE in present:
        return "; it is an adapter, which needs a base model"
    return pickle_hint(path, present)
