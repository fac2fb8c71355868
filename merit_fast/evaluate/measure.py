"""Measures one model after another on the same rows, text and prompts."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from merit_fast.data import Example
from merit_fast.data.template import end_token_ids, prompt_ids, with_template
from merit_fast.evaluate.items import ItemScores
from merit_fast.evaluate.losses import Advance, RowScores, can_share, dataset_results, score_rows
from merit_fast.evaluate.models import EvaluationInputs
from merit_fast.evaluate.retention import (
    PROMPTS,
    all_targets,
    answer_rows,
    greedy_answers,
    text_windows,
)
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.schemas import ArmResult
from merit_fast.progress import Task

_ANSWERS_FILE = "base_answers.json"


@dataclass(frozen=True)
class _BaseAnswers:
    """Decisions and answers of the base, which hold for every model."""

    answers: list[list[int]]
    share_rows: bool  # the common beginnings of rows, prompts and answers are computed once
    share_prompts: bool
    share_answers: bool


class Measurer:
    """The rows, the text and the prompts, and the base's answers once it has been measured."""

    def __init__(self, inputs: EvaluationInputs, directory: Path) -> None:
        data_config = inputs.data_config
        tokenizer = with_template(inputs.tokenizer, data_config)
        self.datasets = inputs.datasets
        self.end_ids = (*end_token_ids(tokenizer, data_config), tokenizer.eos_token_id)
        self.pad_token_id = inputs.pad_token_id
        self.config = inputs.config
        self.file = directory / _ANSWERS_FILE
        self.rows = [dataset.examples for dataset in inputs.datasets]
        self.windows = text_windows(tokenizer)
        self.prompts = prompt_ids(tokenizer, data_config, PROMPTS)

    def num_tokens(self, retention: bool) -> int:
        """Tokens through one model, if every answer is as long as it may be."""
        return sum(self._planned.values()) if retention else self._planned["rows"]

    @property
    def _planned(self) -> dict[str, int]:
        answers = len(self.prompts) * self.config.max_new_tokens
        return {
            "rows": sum(dataset.num_tokens for dataset in self.datasets),
            "answers": answers,
            "retention": answers + sum(map(len, self.prompts)),
            "text": sum(len(window.input_ids) for window in self.windows),
        }

    def measure_rows(
        self, name: str, model: nn.Module, displacement: float, task: Task
    ) -> ArmResult:
        """Measures one model on the held-out rows only. The base must have been measured."""
        with self._part("rows", name, task) as advance:
            rows = self._score(model, self.rows, self._read().share_rows, advance)
        return self._result(rows, displacement)

    def measure(
        self, name: str, model: nn.Module, displacement: float, task: Task
    ) -> tuple[ArmResult, ItemScores]:
        """Measures one model on rows, text and prompts. The base must be the first."""
        known = self._read() if self.file.exists() else None
        share_rows = known.share_rows if known else self._can_share(model, self.rows)
        share_prompts = known.share_prompts if known else self._can_share(model, [self._trial])
        with self._part("rows", name, task) as advance:
            rows = self._score(model, self.rows, share_rows, advance)
        with self._part("answers", name, task) as advance:
            own = greedy_answers(
                model,
                self.end_ids,
                self.prompts,
                self.pad_token_id,
                self.config.max_new_tokens,
                share_prompts,
                advance,
            )
        if known is None:
            share = self._can_share(model, [answer_rows(self.prompts, own)])
            known = _BaseAnswers(own, share_rows, share_prompts, share)
            write_text(self.file, json.dumps(asdict(known)) + "\n")
        with self._part("retention", name, task) as advance:
            chat_rows = [answer_rows(self.prompts, known.answers)]
            chat = self._score(model, chat_rows, known.share_answers, advance)
        with self._part("text", name, task) as advance:
            # one at a time: every token is a target, and its logits fill the memory
            text = score_rows(model, [self.windows], self.pad_token_id, 1, advance=advance)
        result = replace(
            self._result(rows, displacement),
            text_loss=float(text.loss.sum() / text.tokens.sum()),
            chat_nll=float(chat.loss.sum() / chat.tokens.sum()),
            answer_length_tokens=sum(map(len, own)) / len(own),
        )
        return result, _items(rows, text, chat)

    def _score(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Example]],
        share: bool,
        advance: Callable[[int], None],
    ) -> RowScores:
        size = self.config.batch_size
        return score_rows(model, groups, self.pad_token_id, size, share, advance)

    def _result(self, rows: RowScores, displacement: float) -> ArmResult:
        datasets = dataset_results(rows, self.datasets)
        return ArmResult(
            loss=float(np.mean([dataset.loss for dataset in datasets.values()])),
            token_loss=float(rows.loss.sum() / rows.tokens.sum()),
            exact_match=float(np.mean([dataset.exact_match for dataset in datasets.values()])),
            text_loss=None,
            chat_nll=None,
            answer_length_tokens=None,
            displacement=displacement,
            datasets=datasets,
        )

    def _can_share(self, model: nn.Module, groups: Sequence[Sequence[Example]]) -> bool:
        return can_share(model, groups, self.pad_token_id)

    @property
    def _trial(self) -> list[Example]:
        """The prompts as rows whose last token is the target."""
        return [all_targets(np.array(ids, np.int32), first=len(ids) - 1) for ids in self.prompts]

    @contextmanager
    def _part(self, part: str, name: str, task: Task) -> Iterator[Advance]:
        """Reports a part's tokens as they are done, and what it did not need when it ends."""
        left = self._planned[part]

        def advance(tokens: int) -> None:
            nonlocal left
            tokens = min(tokens, left)
            left -= tokens
            task.advance(tokens, name)

        yield advance
        task.advance(left, name)

    def _read(self) -> _BaseAnswers:
        return _BaseAnswers(**json.loads(self.file.read_text()))


def _items(rows: RowScores, text: RowScores, chat: RowScores) -> ItemScores:
    return ItemScores(
        row_loss=rows.loss.numpy(),
        row_exact=rows.exact.numpy(),
        row_tokens=rows.tokens.numpy(),
        text_loss=text.loss.numpy(),
        text_tokens=text.tokens.numpy(),
        chat_loss=chat.loss.numpy(),
        chat_tokens=chat.tokens.numpy(),
    )
