"""Tiny models that read images, with their tokenizers and processors, all made from config."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support.vision.image_rows import write_image
from support.vision.layouts import CHATML_IMAGES, LAYOUTS, Layout


def make_vision_tokenizer(directory: Path, layout: Layout) -> Any:
    """Trains a byte-level tokenizer with the layout's special tokens and saves it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user\n assistant\n which digit is it?"] * 4, trainer)
    roles = {"eos_token": "<|im_end|>"} | layout.roles
    named = dict.fromkeys(["<|im_start|>", *roles.values(), *layout.tokens])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in named])
    extra = {key: value for key, value in roles.items() if key not in ("eos_token", "bos_token")}
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=roles["eos_token"],
        bos_token=roles.get("bos_token"),
        extra_special_tokens=extra,
    )
    fast.save_pretrained(directory)
    return fast


def make_vision_model(directory: Path, name: str, *, seed: int = 0) -> Any:
    """Saves a tiny model of a layout with its tokenizer, processor and template.

    Args:
        directory: where the checkpoint goes.
        name: key of ``LAYOUTS``.
        seed: seed of the weights.

    Returns:
        The model, in float32 and evaluation mode.
    """
    import transformers

    layout = LAYOUTS[name]
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_vision_tokenizer(directory, layout)
    getattr(transformers, layout.image_processor)(**layout.image_options).save_pretrained(directory)
    settings = {"processor_class": layout.processor, **layout.processor_options}
    (directory / "processor_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(_read_template(layout.template))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.get_vocab()}
    config = layout.config(len(tokenizer), ids)
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that every pixel moves the loss
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    return model.eval()


def make_qwen_folder(folder: Path, images: Mapping[str, tuple[int, int]]) -> Path:
    """Saves a tiny Qwen2.5-VL as folder/model, and images by name and size (width, height)."""
    make_vision_model(folder / "model", "qwen2_5_vl")
    for name, size in images.items():
        write_image(folder / name, *size)
    return folder


def _read_template(name: str | None) -> str:
    if name is None:
        return CHATML_IMAGES
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / name).read_text(encoding="utf-8")
