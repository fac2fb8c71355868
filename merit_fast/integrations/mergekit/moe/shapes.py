"""Mixtures of experts that dense models can be put into: names of tensors, and config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merit_fast.integrations.mergekit.moe.document import MoeDocument

PARTS = ("gate_proj", "up_proj", "down_proj")
RESIDUAL = "down_proj"  # the part that `residual_scale` multiplies
_ATTENTION = tuple(f"self_attn.{part}_proj.weight" for part in "qkvo")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_OUTER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
# Keys of dense configs without a meaning in a mixture.
_DENSE_KEYS = ("auto_map", "pretraining_tp", "mlp_bias", "attention_bias", "quantization_config")


@dataclass(frozen=True)
class Shape:
    """One mixture's names.

    Attributes:
        title: mergekit's name of it.
        model_type, architecture: of config.json.
        sources: model types of dense models that fit.
        block: the module of a layer that holds router and experts.
        parts: name of each of ``PARTS`` in an expert.
        shared: the module of the shared expert; None: there is none.
        extra: more tensors of a layer, next to attention and norms.
        filled: of those, the ones that are 0 where the base lacks them.
    """

    title: str
    model_type: str
    architecture: str
    sources: tuple[str, ...]
    block: str
    parts: Mapping[str, str] = field(default_factory=lambda: {part: part for part in PARTS})
    shared: str | None = None
    extra: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()

    def takes(self, name: str) -> bool:
        """Whether a tensor of the dense base, outside its MLPs, has a place in the mixture."""
        if name in _OUTER:
            return True
        _, _, rest = name.partition("model.layers.")
        _, _, inner = rest.partition(".")
        return inner in (*_ATTENTION, *_NORMS, *self.extra)

    def expert(self, layer: int, number: int, part: str) -> str:
        """Name of a part of a routed expert."""
        inner = f"{self.block}.experts.{number}.{self.parts[part]}.weight"
        return f"model.layers.{layer}.{inner}"

    def shared_expert(self, layer: int, part: str) -> str:
        """Name of a part of the shared expert."""
        return f"model.layers.{layer}.{self.block}.{self.shared}.{self.parts[part]}.weight"

    def router(self, layer: int) -> str:
        """Name of the router's weights, [experts, hidden]."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def shared_gate(self, layer: int) -> str:
        """Name of the shared expert's gate, [1, hidden]."""
        return f"model.layers.{layer}.{self.block}.{self.shared}_gate.weight"


_BIASES = tuple(f"self_attn.{part}_proj.bias" for part in "qkv")
_DEEPSEEK = "deepseek"
SHAPES = (
    Shape(
        "Mixtral",
        "mixtral",
        "MixtralForCausalLM",
        ("llama", "mistral"),
        "block_sparse_moe",
        {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    ),
    Shape(
        "Qwen MoE",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        ("llama", "mistral", "qwen2"),
        "mlp",
        shared="shared_expert",
        extra=_BIASES,
        filled=_BIASES,
    ),
    Shape(
        "Qwen3 MoE",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        ("qwen3",),
        "mlp",
        extra=("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    ),
)


def choose_shape(document: MoeDocument, model_types: Mapping[str, str]) -> Shape:
    """The first shape that fits models and recipe.

    Args:
        model_types: the model_type of every model, by the key that names it.

    Raises:
        InputError: model types differ, or no shape fits.
    """
    first_key, first = next(iter(model_types.items()))
    for key, model_type in model_types.items():
        if model_type != first:
            rule = f"must be of model_type {first} as {first_key}, got {model_type}"
            raise document.error(key, rule)
    asked = (document.architecture or "").lower()
    if asked and _DEEPSEEK.startswith(asked[: len(_DEEPSEEK)]):
        raise document.error(
            "architecture", "must not be DeepSeek: its code is no part of transformers"
        )
    candidates = [shape for shape in SHAPES if shape.title.lower().startswith(asked)]
    if not candidates:
        titles = ", ".join(shape.title for shape in SHAPES)
        rule = f"must be the beginning of one of {titles}, got {document.architecture!r}"
        raise document.error("architecture", rule)
    fitting = [shape for shape in candidates if _fits(shape, document, first)]
    if fitting:
        return fitting[0]
    shared = len(document.shared)
    rule = (
        f"{first} models with {shared} shared experts fit none of "
        f"{', '.join(shape.title for shape in candidates)}: Mixtral takes llama and mistral, Qwen3 "
        "MoE qwen3, both without shared experts; Qwen MoE takes llama, mistral and qwen2 with one "
        "shared expert, which has prompts unless gate_mode is random"
    )
    raise document.error("experts", rule)


def mixture_config(
    shape: Shape, base: Mapping[str, Any], document: MoeDocument, dtype: str
) -> dict[str, Any]:
    """config.json of the mixture, from that of the dense base. ``dtype`` is torch's name."""
    values = {key: value for key, value in base.items() if key not in _DENSE_KEYS}
    dtype_key = "torch_dtype" if "torch_dtype" in base and "dtype" not in base else "dtype"
    values |= {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "num_experts_per_tok": document.experts_per_token,
        "sliding_window": None,
        dtype_key: dtype,
    }
    count = len(document.experts)
    if shape.model_type == SHAPES[0].model_type:
        return values | {"num_local_experts": count}
    values |= {
        "num_experts": count,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "use_sliding_window": False,
        "mlp_only_layers": [],
        "moe_intermediate_size": base.get("intermediate_size"),
    }
    if shape.shared:
        values["shared_expert_intermediate_size"] = base.get("intermediate_size")
    return values


def _fits(shape: Shape, document: MoeDocument, model_type: str) -> bool:
    if model_type not in shape.sources:
        return False
    if shape.shared is None:
        return not document.shared
    has_gate = document.is_drawn or all(expert.positive for expert in document.shared)
    return len(document.shared) == 1 and has_gate
