"""The demo's mixture: real facts as short instructions; no family trains on a held-out input.

A hash of seed, family and input ranks the inputs. So the rows depend on neither PYTHONHASHSEED, the
order in which a package lists its data, nor a random generator, and all tasks of a family train and
hold out the same inputs.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from merit_fast.demo.sources import FAMILIES, SOURCES, Facts
from merit_fast.errors import MeritFastError
from merit_fast.manifests.atomic import write_text

NUM_TRAIN = 10
NUM_HELD_OUT = 5
QUICK_NUM_TRAIN = 10
QUICK_NUM_HELD_OUT = 8
QUICK_TASKS = (
    "country_capital",
    "country_iso3",
    "country_fr",
    "country_de",
    "date_us",
    "date_de",
    "verb_past",
    "verb_gerund",
)
MAX_ANSWER_CHARACTERS = 60
SYSTEM_MESSAGE = "Answer briefly."  # without one, SmolLM2's template adds 20 tokens


@dataclass(frozen=True)
class TaskRows:
    """One dataset: (input, answer) pairs under one instruction."""

    instruction: str
    train: tuple[tuple[str, str], ...]
    held_out: tuple[tuple[str, str], ...]


def prepare_mixture(
    directory: Path, *, quick: bool, seed: int = 0, include_copyleft: bool = False
) -> list[dict[str, str]]:
    """Writes the demo's datasets into ``directory`` and returns them as a config's ``mixture:``.

    Each dataset is NAME.train.jsonl and NAME.eval.jsonl, with ``{"messages": [system, user,
    assistant]}`` on each line. The same arguments and package versions give the same bytes.

    Args:
        directory: created if necessary; replaces files of the same names and keeps others.
        quick: 8 datasets of 12 + 8 rows instead of 28 of 18 + 10.
        seed: decides the inputs and which of them are held out.
        include_copyleft: adds two datasets made with num2words (LGPL).

    Returns:
        One mapping per dataset: ``name``, ``path`` and ``eval_path``, the paths absolute.

    Raises:
        MeritFastError: a package of the demo extra is not installed, or holds too few facts.
    """
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    mixture = []
    for name, task in build_tasks(
        quick=quick, seed=seed, include_copyleft=include_copyleft
    ).items():
        path = directory / f"{name}.train.jsonl"
        eval_path = directory / f"{name}.eval.jsonl"
        write_text(path, _lines(task.instruction, task.train))
        write_text(eval_path, _lines(task.instruction, task.held_out))
        mixture.append({"name": name, "path": str(path), "eval_path": str(eval_path)})
    return mixture


def build_tasks(
    *, quick: bool, seed: int = 0, include_copyleft: bool = False
) -> dict[str, TaskRows]:
    """Rows that ``prepare_mixture`` writes, by dataset name."""
    num_train = QUICK_NUM_TRAIN if quick else NUM_TRAIN
    num_held_out = QUICK_NUM_HELD_OUT if quick else NUM_HELD_OUT
    needed = num_held_out + num_train
    copyleft = {family for source in SOURCES if source.is_copyleft for family in source.families}
    tasks = {}
    for name, family in FAMILIES.items():
        if name in copyleft and not include_copyleft:
            continue
        wanted = {
            task: text
            for task, text in family.instructions.items()
            if not quick or task in QUICK_TASKS or name in copyleft
        }
        if not wanted:
            continue
        facts = _complete(family.load(), set(family.instructions))
        inputs = _ranked(facts, seed, family.split_like or name)[:needed]
        if len(inputs) < needed:
            raise MeritFastError(
                f"demo tasks: {name}: needs {needed} facts, the packages hold {len(inputs)}"
            )
        for task, instruction in wanted.items():
            pairs = tuple((text, facts[text][task]) for text in inputs)
            tasks[task] = TaskRows(
                instruction, train=pairs[num_held_out:], held_out=pairs[:num_held_out]
            )
    return tasks


def _complete(facts: Facts, tasks: set[str]) -> Facts:
    """Inputs that every task of the family answers, with clean and short answers."""
    return {
        text: answers
        for text, answers in facts.items()
        if "(" not in text and tasks == answers.keys() and all(map(_is_clean, answers.values()))
    }


def _is_clean(answer: str) -> bool:
    return 0 < len(answer) <= MAX_ANSWER_CHARACTERS and answer.isprintable() and "(" not in answer


def _ranked(facts: Facts, seed: int, family: str) -> list[str]:
    return sorted(
        facts, key=lambda text: hashlib.sha256(f"{seed}/{family}/{text}".encode()).digest()
    )


def _lines(instruction: str, pairs: tuple[tuple[str, str], ...]) -> str:
    rows = (
        {
            "messages": [
                {"role": "system", "content": SYSTEM_MESSAGE},
                {"role": "user", "content": f"{instruction}\n{text}"},
                {"role": "assistant", "content": answer},
            ]
        }
        for text, answer in pairs
    )
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
