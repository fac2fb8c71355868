"""Tensors with a row for each token, known by their names."""

# Ends of names. The first that a model has is its input embedding.
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "shared.weight",
    "backbone.embeddings.weight",  # Mamba
    "backbone.embedding.weight",
    "rwkv.embeddings.weight",
)
_OTHERS = (
    "embed_tokens_per_layer.weight",  # Gemma 3n
    "lm_head.weight",
    "lm_head.bias",
    "lm_head.linear.weight",
    "lm_head.linear.bias",
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
    "embed_out.weight",
    "embed_out.bias",
    "output.weight",
    "output_layer.weight",
    "proj_out.weight",  # Whisper
    "head.weight",  # RWKV
    "shared_head.head.weight",  # DeepSeek's layers that predict further tokens
    "cls.predictions.bias",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
    "predictions.decoder.weight",
    "predictions.decoder.bias",
    "predictions.bias",
    "vocab_projector.weight",
    "vocab_projector.bias",
)
_LAST_AXIS = ("final_logits_bias",)  # [1, V]


def token_axis(name: str, shape: tuple[int, ...]) -> int | None:
    """The dimension of a tensor that counts tokens; None where its name tells of none."""
    if any(ends_with(name, ending) for ending in _LAST_AXIS):
        return len(shape) - 1
    return 0 if any(ends_with(name, ending) for ending in (*EMBEDDINGS, *_OTHERS)) else None


def differ_in_rows(name: str, first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether two tensors of a name have one shape, but for their numbers of tokens."""
    axis = token_axis(name, first)
    if axis is None or len(first) != len(second) or not first:
        return False
    return first[:axis] + first[axis + 1 :] == second[:axis] + second[axis + 1 :]


def ends_with(name: str, ending: str) -> bool:
    """Whether the last words of a name, between dots, are those of ``ending``."""
    return name == ending or name.endswith(f".{ending}")
