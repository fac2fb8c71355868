"""The chat template of the output: a built-in one, the models' most common one, or a Jinja text."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from merit_fast.errors import InputError, one_line, show
from merit_fast.merge.read.files import folder_of, list_directory, open_regular, read_json
from merit_fast.merge.read.remote import Location

AUTO = "auto"
# Whole turns of the formats, as their models were trained on them.
BUILT_IN = {
    "alpaca": (
        r"{% for message in messages %}{{ '' if loop.first else '\n\n' }}"
        r"{% if message['role'] == 'user' %}{{ '### Instruction:\n' }}"
        r"{% elif message['role'] == 'user_context' %}{{ '### Input:\n' }}"
        r"{% elif message['role'] == 'assistant' %}{{ '### Response:\n' }}{% endif %}"
        r"{{ message['content'] | trim }}{% endfor %}"
        r"{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
        r"{{ '\n\n### Response:\n' }}{% endif %}"
    ),
    "chatml": (
        r"{% for message in messages %}"
        r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        r"{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "exaone": (
        r"{% for message in messages %}"
        r"{% if loop.first and message['role'] != 'system' %}"
        r"{{ '[|system|][|endofturn|]\n' }}{% endif %}"
        r"{{ '[|' + message['role'] + '|]' + message['content'] }}"
        r"{{ '\n' if message['role'] == 'user' else '[|endofturn|]\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
    "llama3": (
        r"{{ bos_token }}{% for message in messages %}"
        r"{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        r"{{ (message['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
        r"{% if add_generation_prompt %}"
        r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        r"{% set has_system = messages[0]['role'] == 'system' %}"
        r"{% set turns = messages[1:] if has_system else messages %}{{ bos_token }}"
        r"{% for message in turns %}"
        r"{% if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
        r"{{ raise_exception('roles must alternate: user, assistant, user, ...') }}{% endif %}"
        r"{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
        r"{% else %}{{ ' [INST] ' }}"
        r"{% if loop.first and has_system %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
        r"{{ message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
}
_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_GENERATION_TAGS = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # transformers' own


def template_text(option: str | None, models: Sequence[Location]) -> str | None:
    """The text of the output's chat template; None: it is the tokenizer's own, if it has one.

    Args:
        option: name of a built-in template; "auto": the one that most models have, of equally
            common ones the first; a Jinja text; None.
        models: of the merge, in order.

    Raises:
        InputError: no such name, or no Jinja.
    """
    if option is None:
        return None
    if option == AUTO:
        found = [text.strip() for path in models if (text := own_template(folder_of(path)))]
        return Counter(found).most_common(1)[0][0] if found else None
    if option in BUILT_IN:
        return BUILT_IN[option]
    if "{" not in option:
        names = ", ".join((AUTO, *BUILT_IN))
        raise InputError(f"chat_template: must be {names} or a Jinja text, got {show(option)}")
    _check_syntax(option)
    return option


def checked_template(
    option: str | None, models: Sequence[Location], tokenizer: Location
) -> str | None:
    """As ``template_text``, for an output with the tokenizer of a directory.

    Raises:
        InputError: the directory holds no tokenizer that could use it.
    """
    text = template_text(option, models)
    if text is not None and not {_CONFIG, "tokenizer.json"} & {*list_directory(tokenizer)}:
        raise InputError(f"chat_template: must be absent, {tokenizer} holds no tokenizer")
    return text


def own_template(folder: Location) -> str | None:
    """The default chat template of a model; None where it has none."""
    present = list_directory(folder)
    if _TEMPLATE in present:
        with open_regular(folder / _TEMPLATE) as file:
            return file.read().decode()
    template: Any = None
    for name in (_CONFIG, "chat_template.json"):
        if name in present and template is None:
            template = read_json(folder / name).get("chat_template")
    if isinstance(template, list):  # an older form: [{name, template}, ...]
        named = {entry.get("name"): entry for entry in template if isinstance(entry, dict)}
        template = named.get("default", {}).get("template")
    return template if isinstance(template, str) else None


def _check_syntax(text: str) -> None:
    import jinja2

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.parse(_GENERATION_TAGS.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"chat_template: is no Jinja: {one_line(error)}") from None
