"""Images on disk, and conversations that name them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merit_fast.data.conversation import Conversation, Image, Message


@dataclass(frozen=True)
class Turn:
    """A question with images before its text, and its answer; None: no answer."""

    question: str
    answer: str | None
    images: tuple[str, ...] = ()
    last: bool = False  # the images stand behind the text


def make_conversation(folder: Path, *turns: Turn) -> Conversation:
    """A row of ``folder``/rows.jsonl with the images of its turns."""
    messages = []
    for turn in turns:
        parts = [{"type": "image"} for _ in turn.images]
        text = {"type": "text", "text": turn.question}
        content = (*parts, text) if not turn.last else (text, *parts)
        messages.append(Message("user", content if parts else turn.question))
        if turn.answer is not None:
            messages.append(Message("assistant", turn.answer))
    images = tuple(Image(path=path) for turn in turns for path in turn.images)
    return Conversation(f"{folder}/rows.jsonl:1", tuple(messages), images=images)


def write_image(path: Path, width: int, height: int, *, mode: str = "RGB", seed: int = 0) -> Path:
    """Writes an image of random pixels, in the format of the path's suffix."""
    from PIL import Image as pillow

    random = np.random.default_rng((seed, width, height))
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.fromarray(pixels).convert(mode).save(path)
    return path
