"""Writes entries and configurations of axolotl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merit_fast.errors import InputError
from merit_fast.export.form import Form, Names, tools_of
from merit_fast.export.messages import MARK, ImageFiles, chat_messages
from merit_fast.export.rows import ExportRow
from merit_fast.export.settings import EVAL_KEYS, Settings, of_group, started_from
from merit_fast.export.survey import Survey

_READ_KEYS = {"tool_calls", "tool_call_id", "name", "reasoning_content", "train", "weight"}
_REPLACED = (
    "datasets",
    "test_datasets",
    "val_set_size",
    "dataset_prepared_path",
    "pretraining_dataset",
    "train_on_inputs",
)


def axolotl_form(found: Survey, names: Names) -> Form:
    """Turns are read as they came where axolotl trains the same of them, else from new messages.

    Raises:
        InputError: rows hold arguments of the template, which axolotl does not take from a row.
    """
    if arguments := found.template_arguments - {"parallel_tool_calls"}:
        raise InputError(
            f"mixture: {found.name}: chat_template_kwargs: axolotl reads none from a row, got "
            f"{', '.join(sorted(arguments))}"
        )
    if _is_native(found):
        assert found.turn_keys and found.turns_column
        role, content = found.turn_keys
        return Form(
            {
                **_entry(found.turns_column, role, content),
                "roles": {role: sorted(words) for role, words in sorted(found.words.items())},
                "roles_to_train": ["assistant"],
                "train_on_eos": "turn",
            }
        )

    def extra(row: ExportRow, images: ImageFiles) -> dict[str, Any]:
        added: dict[str, Any] = {names.messages: chat_messages(row, images)}
        if found.has_tools:
            added[names.tools] = tools_of(row)
        return added

    entry = _entry(names.messages, "role", "content")
    if found.has_tools and names.tools != "tools":
        entry["field_tools"] = names.tools
    entry["train_on_eos"] = "turn"
    marks = {"message_field_training": MARK, "roles_to_train": ["assistant"]}
    return Form(entry | marks, extra)


def axolotl_config(
    train: Sequence[tuple[str, Form]],
    held_out: Sequence[tuple[str, Form]],
    settings: Settings,
    user: Mapping[str, Any] | None,
    group: int,
) -> dict[str, Any]:
    """The configuration of one group: the user's keys, or a minimal one, with its rows."""
    replaced = (*_REPLACED, *(() if held_out else EVAL_KEYS))
    config = started_from(
        user, lambda: _minimal(settings), settings, model_key="base_model", replaced=replaced
    )
    config["datasets"] = [{"path": path, **form.entry} for path, form in train]
    if held_out:
        config["test_datasets"] = [{"path": path, **form.entry} for path, form in held_out]
    else:
        config["val_set_size"] = 0
    return of_group(config, settings, group)


def _is_native(found: Survey) -> bool:
    has_turns = found.turns_column is not None and found.turn_keys is not None
    is_known = found.other_keys <= _READ_KEYS and "function_call" not in _words(found)
    has_columns = all(
        found.column(name) in (None, name) and not found.is_split(name)
        for name in ("system", "tools")
    )
    return (
        has_turns
        and found.is_plain
        and is_known
        and has_columns
        and found.answers_only
        and not found.has_images
    )


def _words(found: Survey) -> set[str]:
    return {word for words in found.words.values() for word in words}


def _entry(column: str, role: str, content: str) -> dict[str, Any]:
    return {
        "ds_type": "json",
        "split": "train",
        "type": "chat_template",
        "field_messages": column,
        "message_property_mappings": {"role": role, "content": content},
    }


def _minimal(settings: Settings) -> dict[str, Any]:
    config: dict[str, Any] = {
        "base_model": settings.model,
        "chat_template": "tokenizer_default",
        "sequence_len": settings.max_length,
        "sample_packing": settings.packing,
        "num_epochs": settings.epochs,
        "micro_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "optimizer": "adamw_torch",
        "learning_rate": settings.learning_rate,
        "lr_scheduler": "cosine",
        "cosine_min_lr_ratio": settings.final_fraction,
        "warmup_ratio": settings.warmup_fraction,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.beta1,
        "adam_beta2": settings.beta2,
        "max_grad_norm": settings.clip_norm,
        "bf16": "auto",
        "seed": settings.seed,
    }
    if settings.chat_template is not None:
        config |= {"chat_template": "jinja", "chat_template_jinja": settings.chat_template}
    return config
