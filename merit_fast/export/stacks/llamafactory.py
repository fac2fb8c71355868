"""Writes entries of dataset_info.json and configurations of LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.export.form import Form, Names, tools_of
from merit_fast.export.messages import ImageFiles, tagged_messages
from merit_fast.export.rows import ExportRow
from merit_fast.export.settings import EVAL_KEYS, Settings, of_group, started_from
from merit_fast.export.survey import Survey

_REPLACED = (
    "dataset",
    "eval_dataset",
    "dataset_dir",
    "media_dir",
    "val_size",
    "tokenized_path",
    "max_samples",
    "mix_strategy",
    "interleave_probs",
    "train_on_prompt",
    "mask_history",
)
_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_ALPACA = {  # format -> name in LLaMA-Factory: name in the format
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "history",
    },
    "prompt and completion": {"prompt": "prompt", "response": "completion"},
}


def llamafactory_form(found: Survey, names: Names) -> Form:
    """Rows are read as they came where LLaMA-Factory reads the same, else from new messages.

    Raises:
        InputError: rows mark single turns for the loss, or hold arguments of the template.
    """
    if arguments := found.template_arguments - {"parallel_tool_calls"}:
        raise InputError(
            f"mixture: {found.name}: chat_template_kwargs: llamafactory reads none from a row, "
            f"got {', '.join(sorted(arguments))}"
        )
    if not (found.answers_only or found.last_only):
        raise InputError(
            f"mixture: {found.name}: llamafactory trains every answer or the last one, and these "
            "rows mark others for the loss; axolotl reads such marks"
        )
    is_simple = not (found.has_fields or found.has_tools or found.has_images)
    if is_simple and found.is_plain and found.alternates and not found.is_split("system"):
        columns = {"system": found.column("system")} if found.column("system") else {}
        if entry := _alpaca_entry(found, columns) or _turns_entry(found, columns):
            return Form(entry)

    def extra(row: ExportRow, images: ImageFiles) -> dict[str, Any]:
        added: dict[str, Any] = {names.messages: tagged_messages(row)}
        if found.has_tools:
            added[names.tools] = tools_of(row)
        if found.has_images:
            added[names.images] = [images(image) for image in row.conversation.images]
        return added

    columns = {"messages": names.messages}
    if found.has_tools:
        columns["tools"] = names.tools
    if found.has_images:
        columns["images"] = names.images
    return Form({"formatting": "sharegpt", "columns": columns, "tags": dict(_TAGS)}, extra)


def needs_mask(surveys: Sequence[Survey]) -> bool:
    """Whether a group is trained on last answers only, LLaMA-Factory's ``mask_history``.

    Raises:
        InputError: some datasets are trained on every answer, and others on the last one.
    """
    if all(found.answers_only for found in surveys):
        return False
    for found in surveys:
        if not found.last_only:
            others = next(other.name for other in surveys if not other.answers_only)
            raise InputError(
                f"mixture: {found.name}: every answer is in the loss, but in {others} the last "
                "one only; llamafactory knows one rule for a run (mask_history)"
            )
    return True


def llamafactory_config(
    datasets: Sequence[Sequence[str]],
    settings: Settings,
    user: Mapping[str, Any] | None,
    group: int,
    *,
    folder: Path,
    mask_history: bool,
    num_rows: int,
) -> dict[str, Any]:
    """The configuration of one group's run; ``datasets`` names training and held-out ones.

    Raises:
        InputError: the run has a template of its own, which LLaMA-Factory has no key for.
    """
    if user is None and settings.chat_template is not None:
        raise InputError(
            "data.chat_template: llamafactory reads no Jinja file; give your own "
            "configuration, which names its template, by --extend"
        )
    train, held_out = datasets
    config = started_from(
        user,
        lambda: _minimal(settings, num_rows),
        settings,
        model_key="model_name_or_path",
        replaced=(*_REPLACED, *(() if held_out else EVAL_KEYS)),
    )
    config |= {"dataset_dir": str(folder), "dataset": ",".join(train)}
    if held_out:
        config["eval_dataset"] = ",".join(held_out)
    if mask_history:
        config["mask_history"] = True
    return of_group(config, settings, group)


def _alpaca_entry(found: Survey, columns: dict[str, Any]) -> dict[str, Any] | None:
    wanted = _ALPACA.get(found.format_name)
    if wanted is None or found.words or any(found.is_split(name) for name in wanted.values()):
        return None
    read = {name: found.column(own) for name, own in wanted.items() if found.column(own)}
    return {"formatting": "alpaca", "columns": read | columns}


def _turns_entry(found: Survey, columns: dict[str, Any]) -> dict[str, Any] | None:
    one_word = all(len(words) == 1 for words in found.words.values())
    known = set(found.words) <= {"system", "user", "assistant", "tool"}
    if not (found.turns_column and found.turn_keys and one_word and known):
        return None
    role, content = found.turn_keys
    tags = {"role_tag": role, "content_tag": content}
    names = {"user": "user_tag", "assistant": "assistant_tag", "system": "system_tag"}
    for name, tag in (names | {"tool": "observation_tag"}).items():
        if name in found.words:
            tags[tag] = next(iter(found.words[name]))
    return {
        "formatting": "sharegpt",
        "columns": {"messages": found.turns_column, **columns},
        "tags": _TAGS | tags,
    }


def _minimal(settings: Settings, num_rows: int) -> dict[str, Any]:
    return {
        "model_name_or_path": settings.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "cutoff_len": settings.max_length,
        "packing": settings.packing,
        **settings.trainer_keys(num_rows),
    }
