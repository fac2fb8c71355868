"""From merged tensors to a model of transformers, which is imported when a function is called."""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from merit_fast.errors import InputError, one_line
from merit_fast.manifests.atomic import write_text
from merit_fast.merge.in_memory.lazy import MergedTensors
from merit_fast.merge.read.companions import find_head, output_dtypes
from merit_fast.merge.read.files import list_directory, read_json
from merit_fast.merge.read.remote import Location
from merit_fast.merge.vocabulary.configs import CONFIG_FILES, fitted_config
from merit_fast.merge.vocabulary.match import OutputVocabulary
from merit_fast.model import no_loading_bar

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


class Kind(NamedTuple):
    """Configs and class of a model directory, as transformers reads them."""

    config: Any
    model_class: Any
    generation: Any  # or None


def kind_of(path: Location, vocabulary: OutputVocabulary | None = None) -> Kind:
    """config.json, the class it names first, and generation_config.json.

    Args:
        path: the model that gives them.
        vocabulary: the rows and ids of tokens that they then have; None: their own.

    Raises:
        InputError: transformers cannot read them, or has no such class.
    """
    import transformers

    generation = None
    with _local_configs(path, vocabulary) as folder:
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if (folder / CONFIG_FILES[1]).exists():
                generation = transformers.GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{path}: has no config that transformers can read: {one_line(error)}"
            ) from None
    names = config.architectures or [None]
    model_class = getattr(transformers, str(names[0]), None)
    if not (
        isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    ):
        raise InputError(
            f"{path / 'config.json'}: architectures: must name a model of transformers, got "
            f"{names[0]}"
        )
    return Kind(config, model_class, generation)


def fit_config(kind: Kind, source: MergedTensors, dequantized: bool) -> None:
    """Makes a model's config agree with the merged tensors, as a file merge changes config.json."""
    import torch

    config = kind.config
    configs = (config, config.get_text_config())
    dtypes = output_dtypes(
        (tensor.dtype, tensor.num_elements) for tensor in source.tensors.values()
    )
    if dtypes and config.dtype is not None:
        config.dtype = getattr(torch, dtypes[0])
    for each in configs:
        if dequantized and hasattr(each, "quantization_config"):
            del each.quantization_config
    pair = find_head({name: tensor.inputs[0] for name, tensor in source.tensors.items()})
    if pair is not None and any(getattr(each, "tie_word_embeddings", False) for each in configs):
        # A tied model would drop its own head.
        embedding, head = (source.read(entry.name) for entry in pair)
        if embedding.dtype != head.dtype or not torch.equal(_bytes(embedding), _bytes(head)):
            for each in configs:
                each.tie_word_embeddings = False


def build_model(
    path: Location, kind: Kind, source: MergedTensors, device: "torch.device"
) -> "PreTrainedModel":
    """A model of the source's tensors, renamed and joined as transformers does.

    Raises:
        InputError, MeritFastError: the first error of a tensor; or the class lacks tensors of
            ``path``.
    """
    options: dict[str, Any] = {} if device.type == "cpu" else {"device_map": device}
    if kind.generation is not None:
        options["generation_config"] = kind.generation
    try:
        with no_loading_bar():
            model, report = kind.model_class.from_pretrained(
                None,
                config=kind.config,
                state_dict=source.state_dict(),
                dtype="auto",  # the config's, which agrees; where it has none the tensors'
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise source.error or InputError(f"{path}: cannot be loaded: {one_line(error)}") from None
    _check_report(path, kind.model_class.__name__, report)
    loaded: PreTrainedModel = model
    return loaded


def checked_device(device: "torch.device | str") -> "torch.device":
    """The device, checked to be available.

    Raises:
        InputError: it is no device, torch finds no such GPU, or accelerate is not installed.
    """
    import torch

    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device: {one_line(error)}") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: must be there, got {str(device)!r} where torch finds no GPU")
    if target.type != "cpu" and importlib.util.find_spec("accelerate") is None:
        raise InputError(f"device: {str(device)!r} needs accelerate: pip install accelerate")
    return target


@contextmanager
def _local_configs(path: Location, vocabulary: OutputVocabulary | None) -> Iterator[Path]:
    """A local directory itself; for a store or other rows, a temporary copy of the configs."""
    if isinstance(path, Path) and vocabulary is None:
        yield path
        return
    with TemporaryDirectory() as folder:
        for name in {*CONFIG_FILES} & {*list_directory(path)}:
            values = read_json(path / name)
            if vocabulary is not None:
                values = fitted_config(name, values, path, vocabulary)
            write_text(Path(folder) / name, json.dumps(values))
        yield Path(folder)


def _bytes(tensor: "Tensor") -> "Tensor":
    import torch

    return tensor.reshape(-1).view(torch.uint8)


def _check_report(path: Location, class_name: str, report: Mapping[str, Any]) -> None:
    for key, rule in (
        ("missing_keys", "is missing, {} needs it"),
        ("unexpected_keys", "is not in {}"),
    ):
        if names := sorted(report[key]):
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise InputError(f"{path}: {names[0]}: {rule.format(class_name)}{more}")
    for name, shape, expected in sorted(report["mismatched_keys"]):
        raise InputError(
            f"{path}: {name}: shape must be {list(expected)} by config.json, got {list(shape)}"
        )
