"""Models that read images: which they are, which weights see images, and their inputs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from merit_fast.errors import MeritFastError

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKEN_TYPES = "mm_token_type_ids"  # forwards that take them compute positions from them
# Names that forwards give to the token types; the others mark images by their token ids only.
_TOKEN_TYPE_NAMES = (TOKEN_TYPES, "token_type_ids")


def reads_images(config: Any) -> bool:
    """Whether a config of transformers describes a language model with a vision tower."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    has_tower = getattr(config, "vision_config", None) is not None
    return has_tower and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def tower_parameters(model: "nn.Module") -> dict[str, "nn.Parameter"]:
    """Parameters of the vision tower and the projector: those outside decoder and head.

    Empty for a model of text only.
    """
    if not reads_images(getattr(model, "config", None)):
        return {}
    parts = (model.get_decoder(), model.get_output_embeddings())  # type: ignore[operator]
    text = {id(p) for part in parts if part is not None for p in part.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in text}


def media_inputs(
    media: Mapping[str, "Tensor"], accepted: Mapping[str, Any], device: Any
) -> dict[str, "Tensor"]:
    """Pixel inputs and token types of a batch, by the names of the model's forward.

    Args:
        media: by name, as ``Batch.media`` holds them.
        accepted: parameters of the model's forward.
        device: where the inputs go.

    Raises:
        MeritFastError: the forward has no argument for one of the pixel inputs.
    """
    inputs = {}
    for name, tensor in media.items():
        if name in _TOKEN_TYPE_NAMES:
            name = next((known for known in _TOKEN_TYPE_NAMES if known in accepted), "")
        elif name not in accepted:
            raise MeritFastError(
                f"the model's forward takes no {name}, which the images of this batch need: "
                "the processor is another model's"
            )
        if name:
            inputs[name] = tensor.to(device)
    return inputs


def forget_positions(model: "nn.Module") -> None:
    """Discards the offset of positions that a model with M-RoPE keeps from its last images."""
    inner = getattr(model, getattr(model, "base_model_prefix", ""), model)
    if getattr(inner, "rope_deltas", None) is not None:
        inner.rope_deltas = None


def computes_positions(media: Mapping[str, "Tensor"], accepted: Mapping[str, Any]) -> bool:
    """Whether the model itself must compute the positions of this batch.

    Images have positions in three dimensions (M-RoPE), which the forward computes from the token
    types and the grid of the images, if it gets no positions.
    """
    has_images = any(name not in _TOKEN_TYPE_NAMES for name in media)
    return has_images and TOKEN_TYPES in accepted
