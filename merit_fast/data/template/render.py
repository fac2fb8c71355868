"""Renders a conversation to texts with the characters of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merit_fast.data.config import DataConfig, TrainOn
from merit_fast.data.conversation import Conversation
from merit_fast.data.rows.loss import messages_in_loss
from merit_fast.data.template.answers import Answers, Turn, find_facts, probe
from merit_fast.data.template.control import ControlTokens, Marks
from merit_fast.data.template.forms import Form, forms
from merit_fast.data.template.jinja import LeftOut, Refusal, Template, Tools
from merit_fast.data.template.tokenizer import resolve_template
from merit_fast.data.template.traces import has_fields, require_contents, require_fields
from merit_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWRITTEN = "rewritten"  # outcome: the template shows earlier turns in another way
OPENED = "opened"  # outcome: the assistant speaks first, which is not trained
_UNREAD_ARGUMENTS = ("parallel_tool_calls",)  # a setting of chat APIs that few templates show
SPLIT = "split"  # outcome: text spells a control token and is tokenized as text

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rendered:
    """One text of a conversation.

    Attributes:
        place: "file:line" of the row.
        text: as the model sees it.
        spans: half-open character ranges of the answers, in order; none ends in whitespace.
        plain: ranges that spell a control token but are text.
        outcomes: words counted in the notes of the dataset, equal for all texts of a row.
    """

    place: str
    text: str
    spans: Ranges
    plain: Ranges = ()
    outcomes: tuple[str, ...] = ()


class Renderer:
    """A chat template in force, with the settings of the `data:` section.

    Args:
        tokenizer: a fast tokenizer.
        data_config: the `data:` section.
        template_owner: has the chat template where the tokenizer does not, such as a processor.

    Raises:
        InputError: there is no template or template file, it is not Jinja, it does not read an
            argument of `data.template_arguments`, or "plain" has no end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data_config: DataConfig,
        template_owner: Any = None,
    ) -> None:
        self._config = data_config
        source = resolve_template(template_owner or tokenizer, data_config.chat_template)
        self.template = Template(source, tokenizer.special_tokens_map, data_config.date)
        self._arguments = dict(data_config.template_arguments or {})
        self.template.require_reads(self._arguments, "data.template_arguments")
        as_parts, written = probe(self.template, self._arguments)
        self.control = ControlTokens(tokenizer, written)
        self._facts = find_facts(self.template, self.control, self._arguments, as_parts)

    def render(self, conversation: Conversation, train_on: TrainOn) -> list[Rendered]:
        """Applies the template; messages after the last trained turn are left out.

        Where the template shows earlier turns in another way than the model wrote them, the row
        gives one text per answer, each with the history that the model sees at that turn. Every
        answer is in exactly one span.

        Raises:
            InputError: nothing is in the loss, the template fails, it leaves out something that
                the row carries, or nothing tells where an answer begins.
        """
        in_loss = messages_in_loss(conversation, train_on)
        left_out: list[LeftOut] = []
        last: Refusal | None = None
        for form in forms(conversation, in_loss, self._facts.as_parts):
            try:
                return self._render_form(conversation, form)
            except Refusal as refusal:
                left_out += [refusal] if isinstance(refusal, LeftOut) else []
                last = last if form.refits_calls else refusal
        raise InputError(f"{conversation.place}: {left_out[0] if left_out else last}")

    def _render_form(self, conversation: Conversation, form: Form) -> list[Rendered]:
        place = conversation.place
        trained = _trainable(form)
        outcomes = list(form.outcomes)
        if len(trained) < sum(form.in_loss):
            outcomes.append(OPENED)
        if not trained:
            rule = "must have an answer of the assistant behind a turn of the user, found none"
            raise Refusal(rule if any(form.in_loss) else _no_answer())
        messages: list[Mapping[str, Any]] = list(form.messages[: trained[-1] + 1])
        tools: Tools = conversation.tools
        arguments = self._arguments_of(conversation)
        marks = self._marks(messages, tools, arguments)
        if marks:
            messages = [
                {**marks.mark(message, is_answer=message["role"] == "assistant"), "role": role}
                for message, role in zip(messages, [m["role"] for m in messages], strict=True)
            ]
            tools = marks.mark(tools)
            arguments = marks.mark(arguments)
            outcomes.append(SPLIT)
        answers = Answers(
            self.template,
            self.control,
            self._facts,
            messages,
            tools,
            arguments,
            self._config.ignore_columns,
        )
        turns = [answers.turn(index) for index in trained]
        self._require_traces(answers, messages, tools, turns, trained)
        whole = turns[-1].text
        if all(whole.startswith(turn.text[: turn.span[1]]) for turn in turns):
            texts = [(whole, [turn.span for turn in turns])]
        else:
            outcomes.append(REWRITTEN)
            texts = [(turn.text, [turn.span]) for turn in turns]
        rendered = []
        for text, spans in texts:
            plain: Ranges = ()
            if marks:
                text, spans, plain = marks.unmark(text, spans)  # type: ignore[assignment]
            rendered.append(Rendered(place, text, tuple(spans), plain, tuple(outcomes)))
        return rendered

    def _arguments_of(self, conversation: Conversation) -> dict[str, Any]:
        own = {
            key: value
            for key, value in conversation.template_arguments.items()
            if key not in (*self._config.ignore_columns, *_UNREAD_ARGUMENTS)
            or self.template.reads(key)
        }
        if own:
            self.template.require_reads(own, f"{conversation.place}: template arguments")
        return {**self._arguments, **own}

    def _marks(self, messages: Any, tools: Any, arguments: Any) -> Marks | None:
        """Marks for the control tokens that the row spells; None without any."""
        if self._config.special_tokens_in_text == "keep":
            return None
        row = (messages, tools, arguments)
        for i, message in enumerate(messages):
            if self.control.found(message["role"]):
                raise Refusal(f"messages[{i}].role: must spell no control token of the tokenizer")
        found = self.control.found((tools, arguments)) or next(
            (
                spelled
                for message in messages
                if (
                    spelled := self.control.found(message, is_answer=message["role"] == "assistant")
                )
            ),
            None,
        )
        if not found:
            return None
        if self._config.special_tokens_in_text == "error":
            rule = "must spell no control token (data.special_tokens_in_text: error)"
            raise Refusal(f"text {rule}, got {found}")
        return Marks(self.control, row)

    def _require_traces(
        self,
        answers: Answers,
        messages: list[Mapping[str, Any]],
        tools: Tools,
        turns: list[Turn],
        trained: list[int],
    ) -> None:
        whole = turns[-1].text
        for turn, index in zip(turns, trained, strict=True):
            if turn is turns[-1] or not whole.startswith(turn.text[: turn.span[1]]):
                require_contents(messages[: index + 1], tools, turn.text, answers.render)
        if has_fields(messages, tools):
            text = answers.render(messages, tools)
            ignored = self._config.ignore_columns
            require_fields(messages, tools, text, answers.render, ignored)


def _trainable(form: Form) -> list[int]:
    """Trained turns; an answer that nobody asked for is history."""
    asked = False
    trained = []
    for i, message in enumerate(form.messages):
        if form.in_loss[i] and (asked or message["role"] != "assistant"):
            trained.append(i)
        asked = asked or message["role"] not in ("system", "developer", "assistant")
    return trained


def _no_answer() -> str:
    return "must have an answer of the assistant, found none"
