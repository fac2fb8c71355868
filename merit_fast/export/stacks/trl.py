"""Writes entries and configurations of TRL's script ``trl sft``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merit_fast.errors import InputError
from merit_fast.export.form import Form, tools_of
from merit_fast.export.messages import ImageFiles, template_messages
from merit_fast.export.rows import ExportRow
from merit_fast.export.settings import EVAL_KEYS, Settings, of_group, started_from
from merit_fast.export.survey import Survey

_REPLACED = (
    "datasets",
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "dataset_streaming",
    "streaming",
    "test_split_size",
    "completion_only_loss",
    *EVAL_KEYS,
)
_ROLES = {"system": {"system"}, "user": {"user"}, "assistant": {"assistant"}, "tool": {"tool"}}


def trl_forms(surveys: Sequence[Survey]) -> dict[str, Form]:
    """Dataset -> form of its rows.

    TRL joins files whose columns have equal types, so rows with further keys in their messages
    share one file with all others. Rows stay as they came where they hold messages that TRL reads.
    Others get messages, where every answer is trained, or a prompt and a completion, where only
    last answers are.

    Raises:
        InputError: rows mark single turns, have columns of the added names, or hold tools next to
            images.
    """
    columns = {column for found in surveys for column in found.columns}
    with_images = any(found.has_images for found in surveys)
    further = [
        *(["images"] if with_images else []),
        *(["tools"] if any(found.has_tools for found in surveys) else []),
        *(["chat_template_kwargs"] if any(found.template_arguments for found in surveys) else []),
    ]
    if with_images and len(further) > 1:
        found = next(one for one in surveys if one.has_tools or one.template_arguments)
        raise InputError(
            f"mixture: {found.name}: {further[1]}: trl leaves it out in a group with images; "
            "export to axolotl or llamafactory"
        )
    is_joined = any(found.has_fields or found.template_arguments for found in surveys)
    sides = ["prompt", "completion"]
    if all(found.last_only for found in surveys) and columns.isdisjoint([*sides, *further]):
        return {found.name: _form(sides, further, is_joined) for found in surveys}
    return {found.name: _messages_form(found, further, is_joined) for found in surveys}


def _messages_form(found: Survey, further: Sequence[str], is_joined: bool) -> Form:
    """Messages of which every answer is trained.

    Raises:
        InputError: other turns are trained, or a column of an added name holds something else.
    """
    if not found.answers_only:
        raise InputError(
            f"mixture: {found.name}: trl trains every answer of messages, and these rows mark "
            "others for the loss; axolotl reads such marks"
        )
    if _is_native(found) and "images" not in further:
        return Form({"columns": ["messages", *further]}, is_joined=is_joined)
    for column in ("messages", *further):
        if column in found.columns:
            raise InputError(
                f"mixture: {found.name}: trl reads the column {column}, which these rows fill "
                "in another form; export to axolotl or llamafactory"
            )
    return _form(["messages"], further, is_joined)


def trl_config(
    train: Sequence[tuple[str, Form]],
    settings: Settings,
    user: Mapping[str, Any] | None,
    group: int,
    *,
    num_rows: int,
) -> dict[str, Any]:
    """The configuration of one group: the user's keys, or a minimal one, with its rows."""
    config = started_from(
        user,
        lambda: _minimal(settings, num_rows),
        settings,
        model_key="model_name_or_path",
        replaced=_REPLACED,
    )
    config["datasets"] = [
        {"path": "json", "data_files": path, "split": "train", **form.entry} for path, form in train
    ]
    columns = {column for _, form in train for column in form.entry["columns"]}
    config["assistant_only_loss"] = "messages" in columns
    if "images" in columns:
        config["packing"] = False
    return of_group(config, settings, group)


def _is_native(found: Survey) -> bool:
    own_tools = not found.has_tools or found.column("tools") == "tools"
    return (
        found.turns_column == "messages"
        and found.turn_keys == ("role", "content")
        and all(words <= _ROLES.get(role, set()) for role, words in found.words.items())
        and own_tools
        and found.answers_only
        and found.is_plain
        and found.other_keys <= {"tool_calls", "tool_call_id", "name", "reasoning_content"}
        and "system" not in found.sources
        and not found.template_arguments
    )


def _form(wanted: Sequence[str], further: Sequence[str], is_joined: bool) -> Form:
    """The form of rows that get the columns ``wanted``, and ``further`` next to them."""

    def extra(row: ExportRow, images: ImageFiles) -> dict[str, Any]:
        messages = template_messages(row.conversation, as_parts="images" in further)
        columns: dict[str, Any] = {"messages": messages}
        if "prompt" in wanted:
            columns = {"prompt": messages[:-1], "completion": messages[-1:]}
        if "images" in further:
            columns["images"] = [images(image) for image in row.conversation.images]
        if "tools" in further:
            columns["tools"] = tools_of(row)
        if "chat_template_kwargs" in further:
            columns["chat_template_kwargs"] = dict(row.conversation.template_arguments)
        return columns

    return Form({"columns": [*wanted, *further]}, extra, is_joined)


def _minimal(settings: Settings, num_rows: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_name_or_path": settings.model,
        "max_length": settings.max_length,
        "packing": settings.packing,
        **settings.trainer_keys(num_rows),
    }
    if settings.chat_template is not None:
        config["chat_template_path"] = settings.chat_template
    return config
