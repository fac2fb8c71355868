"""Image tasks from scikit-learn's handwritten digits, with answer formats that conflict."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 56  # pixels: 4 x 4 patches of 14, 2 x 2 merged tokens


@dataclass(frozen=True)
class Shown:
    """The digits that a row shows, and the quarter turns of all its images."""

    digits: tuple[int, ...]
    turns: int


@dataclass(frozen=True)
class Task:
    """A question about images.

    Attributes:
        num_images: the most images of a row; ``varies``: a row has from one to that many.
        turned: the images are turned by a random number of quarter turns.
    """

    question: str
    answer: Callable[[Shown], str]
    num_images: int = 1
    varies: bool = False
    turned: bool = False


def _order(shown: Shown, words: Sequence[str]) -> str:
    first, second = shown.digits
    return words[int(first > second) - int(first < second) + 1]


# Several tasks ask the same and want another form of answer.
TASKS = {
    "name_word": Task("Which digit is it?", lambda s: WORDS[s.digits[0]]),
    "name_numeral": Task("Which digit is it?", lambda s: str(s.digits[0])),
    "name_sentence": Task("Which digit is it?", lambda s: f"It is a {WORDS[s.digits[0]]}."),
    "parity_word": Task("Is it even or odd?", lambda s: ("even", "odd")[s.digits[0] % 2]),
    "parity_number": Task("Is it even or odd?", lambda s: str(s.digits[0] % 2)),
    "large": Task("Is it above four?", lambda s: ("no", "yes")[s.digits[0] > 4]),
    "large_sign": Task("Is it above four?", lambda s: ("-", "+")[s.digits[0] > 4]),
    "next": Task("Which digit comes next?", lambda s: str((s.digits[0] + 1) % 10)),
    "letters": Task("How many letters has it?", lambda s: str(len(WORDS[s.digits[0]]))),
    "rotate": Task("How is it turned?", lambda s: f"{90 * s.turns} degrees", turned=True),
    "rotate_hours": Task("How is it turned?", lambda s: str(12 - 3 * s.turns), turned=True),
    "compare": Task("Which is larger?", lambda s: _order(s, ("second", "none", "first")), 2),
    "compare_sign": Task("Which is larger?", lambda s: _order(s, "<=>"), 2),
    "sum": Task("What is the sum?", lambda s: str(sum(s.digits)), 2),
    "count": Task("How many digits are there?", lambda s: str(len(s.digits)), 3, varies=True),
    "count_word": Task(
        "How many digits are there?", lambda s: WORDS[len(s.digits)], 3, varies=True
    ),
}


def write_digit_tasks(
    directory: Path,
    names: Sequence[str] = tuple(TASKS),
    *,
    num_train: int,
    num_eval: int,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Writes LLaVA-style rows and PNG files; training and held-out rows show other pictures.

    Args:
        directory: gets ``images/`` and the files of rows.
        names: keys of ``TASKS``.
        num_train: training rows of each task.
        num_eval: held-out rows of each task.
        seed: seed of the choice of digits.

    Returns:
        The `mixture:` list.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = np.arange(len(digits.target)) % 5 == 0
    (directory / "images").mkdir(parents=True, exist_ok=True)
    mixture = []
    for number, name in enumerate(names):
        rng = np.random.default_rng([seed, number])
        entry = {"name": name, "media": str(directory / "images")}
        for key, count, kept in (("path", num_train, ~held_out), ("eval_path", num_eval, held_out)):
            chosen = np.flatnonzero(kept)
            file = directory / f"{name}.{key}.jsonl"
            rows = [
                _row(directory / "images", f"{name}-{key}-{i}", TASKS[name], digits, chosen, rng)
                for i in range(count)
            ]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            entry[key] = str(file)
        mixture.append(entry)
    return mixture


def _row(
    images: Path, name: str, task: Task, digits: Any, chosen: np.ndarray, rng: Any
) -> dict[str, Any]:
    count = int(rng.integers(1, task.num_images + 1)) if task.varies else task.num_images
    turns = int(rng.integers(4)) if task.turned else 0
    picked = rng.choice(chosen, count)
    files = []
    for place, index in enumerate(picked):
        files.append(f"{name}-{place}.png")
        write_picture(images / files[-1], digits.images[index], turns)
    shown = Shown(tuple(int(digits.target[index]) for index in picked), turns)
    question = "<image>\n" * count + task.question
    turns_of_row = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": task.answer(shown)},
    ]
    image = {"image": files[0]} if count == 1 else {"images": files}
    return {"id": name, **image, "conversations": turns_of_row}


def write_picture(file: Path, values: np.ndarray, turns: int) -> None:
    """Writes one 8 x 8 digit as a PNG of 56 x 56 pixels, turned by quarter turns."""
    from PIL import Image

    pixels = np.rot90(255 - np.clip(values * 16, 0, 255), turns).astype(np.uint8)
    Image.fromarray(np.kron(pixels, np.ones((SIDE // 8, SIDE // 8), np.uint8))).save(file)


def write_named_digits(directory: Path) -> dict[str, str]:
    """Writes one row for every training picture, whose answer names the digit.

    Returns:
        An entry of `mixture:`.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    (directory / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in np.flatnonzero(np.arange(len(digits.target)) % 5):
        write_picture(directory / "images" / f"{index}.png", digits.images[index], 0)
        answer = f"This is {WORDS[digits.target[index]]}"
        messages = [
            {"from": "human", "value": "<image>\nWhat do you see?"},
            {"from": "gpt", "value": answer},
        ]
        lines.append(json.dumps({"image": f"{index}.png", "conversations": messages}) + "\n")
    file = directory / "naming.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return {"name": "naming", "path": str(file), "media": str(directory / "images")}
