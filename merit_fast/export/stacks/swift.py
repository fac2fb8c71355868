"""Writes rows and configurations of ms-swift."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from merit_fast.data.conversation import Message
from merit_fast.errors import InputError
from merit_fast.export.form import Form, tools_of
from merit_fast.export.messages import ImageFiles, text_of, with_thoughts
from merit_fast.export.rows import ExportRow
from merit_fast.export.settings import EVAL_KEYS, Settings, of_group, started_from
from merit_fast.export.survey import Survey

_REPLACED = (
    "dataset",
    "cached_dataset",
    "val_dataset",
    "cached_val_dataset",
    "split_dataset_ratio",
    "custom_dataset_info",
    "columns",
    "loss_scale",
    *EVAL_KEYS,
)
_BASE_LOSSES = ("default", "last_round", "all")  # parts of loss_scale that choose turns
_FOLLOWERS = {
    *(("", "system"), ("", "user"), ("system", "user"), ("user", "assistant")),
    *(("assistant", "user"), ("assistant", "tool"), ("tool", "tool"), ("tool", "assistant")),
    ("assistant", ""),
}
_FIELDS = {
    *(("assistant", "tool_calls"), ("assistant", "reasoning_content")),
    *(("tool", "tool_call_id"), ("tool", "name")),
}


def swift_forms(surveys: Sequence[Survey]) -> dict[str, Form]:
    """Dataset -> form of its rows: one file of messages with marks for the loss.

    ms-swift takes columns such as ``label`` or ``solution`` for its own, so rows hold only what it
    shall read: messages, the dataset as ``channel``, tools and images.

    Raises:
        InputError: a row would not be trained as the run trains it.
    """
    for found in surveys:
        _check(found)
    with_images = any(found.has_images for found in surveys)
    with_tools = any(found.has_tools for found in surveys)
    with_names = any(("tool", "name") in found.fields for found in surveys)

    def extra(row: ExportRow, images: ImageFiles) -> dict[str, Any]:
        added: dict[str, Any] = {"messages": _messages(row, with_names), "channel": row.dataset}
        if with_tools:
            added["tools"] = tools_of(row)
        if with_images:
            added["images"] = [images(image) for image in row.conversation.images]
        return added

    form = Form({}, extra, is_joined=True, keeps_columns=False)
    return {found.name: form for found in surveys}


def swift_config(
    train: Sequence[str],
    settings: Settings,
    user: Mapping[str, Any] | None,
    group: int,
    *,
    num_rows: int,
) -> dict[str, Any]:
    """The configuration of one group: the user's keys, or a minimal one, with its rows.

    Raises:
        InputError: the run has a chat template of its own, which ms-swift has no key for.
    """
    if user is None and settings.chat_template is not None:
        raise InputError(
            "data.chat_template: ms-swift reads no Jinja file; give your own configuration, which "
            "names its template"
        )
    config = started_from(
        user,
        lambda: _minimal(settings, num_rows),
        settings,
        model_key="model",
        replaced=_REPLACED,
    )
    if scales := _scales(user):
        config["loss_scale"] = scales
    config |= {"dataset": list(train), "add_version": False}
    return of_group(config, settings, group)


def _check(found: Survey) -> None:
    """Refuses rows that ms-swift would join, drop or mask in another way.

    Raises:
        InputError: the first of them.
    """
    where = f"mixture: {found.name}"
    if arguments := found.template_arguments - {"parallel_tool_calls"}:
        raise InputError(
            f"{where}: chat_template_kwargs: ms-swift's templates take none of a Jinja template, "
            f"got {', '.join(sorted(arguments))}"
        )
    if others := found.loss_roles - {"assistant"}:
        raise InputError(
            f"{where}: ms-swift trains answers only, and these rows put turns of "
            f"{', '.join(sorted(others))} into the loss"
        )
    if not found.ends_in_loss:
        raise InputError(
            f"{where}: the last answer must be in the loss for ms-swift, which trains its end in "
            "any case"
        )
    for pair, place in found.followers.items():
        if pair not in _FOLLOWERS:
            first, second = (role or "the row's edge" for role in pair)
            raise InputError(
                f"{place}: user and assistant must alternate for ms-swift, got {first} before "
                f"{second}"
            )
    for (role, name), place in found.fields.items():
        if (role, name) not in _FIELDS:
            raise InputError(f"{place}: {name}: ms-swift has no place for it in a turn of {role}")


def _messages(row: ExportRow, with_names: bool) -> list[dict[str, Any]]:
    """Messages of one schema; an answer's text and each of its calls are messages of their own."""
    written = []
    for message, in_loss in zip(row.conversation.messages, row.in_loss, strict=True):
        for role, content in _turns(message):
            mark = in_loss if message.role == "assistant" else None
            turn: dict[str, Any] = {"role": role, "content": content, "loss": mark}
            if with_names:
                turn["name"] = message.fields.get("name")
            written.append(turn)
    return written


def _turns(message: Message) -> list[tuple[str, str]]:
    """(role, content) of a message and of the calls in it."""
    thoughts = message.fields.get("reasoning_content")
    text = with_thoughts(thoughts, text_of(message))
    calls = [call.get("function", call) for call in message.fields.get("tool_calls") or ()]
    turns = [] if calls and not text else [(message.role, text)]
    return turns + [("tool_call", _call(call)) for call in calls]


def _call(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # ms-swift takes a text too
            arguments = json.loads(arguments)
    call = {"name": function.get("name"), "arguments": arguments}
    return json.dumps(call, ensure_ascii=False)


def _scales(user: Mapping[str, Any] | None) -> str:
    """The user's ``loss_scale`` without the part that chooses turns: the rows' marks do."""
    parts = str((user or {}).get("loss_scale") or "").split("+")
    return "+".join(part for part in parts if part and part not in _BASE_LOSSES)


def _minimal(settings: Settings, num_rows: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model": settings.model,
        "tuner_type": "full",
        "max_length": settings.max_length,
        "truncation_strategy": "right",
        "strict": True,
        "gradient_checkpointing": False,
        "report_to": ["none"],
        "data_seed": settings.seed,
        **settings.trainer_keys(num_rows),
        "torch_dtype": "float32",  # of the weights; bf16 of the arithmetic
        "fp16": False,  # which ms-swift takes from torch_dtype float32
    }
    if settings.packing:
        config |= {"packing": True, "attn_impl": "flash_attention_2"}
    return config
