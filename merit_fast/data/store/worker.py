"""A process that encodes rows for another one: pickled messages on its input and output.

First message: (data config, tokenizer). Then (dataset config, rows, number of the first row); the
answer is a Chunk, or the exception. The end of the input ends the process, so a worker never
outlives the process that started it.
"""

import os
import pickle
import sys
from typing import Any, BinaryIO

from merit_fast.data.encode import RowEncoder
from merit_fast.data.store.chunk import pack_rows


def main() -> None:
    """Answers messages until the input ends."""
    source = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write between the answers
    try:
        data_config, tokenizer = pickle.load(source)
        encoders: dict[str, RowEncoder] = {}
        while True:
            config, rows, first_row = pickle.load(source)
            if config.name not in encoders:
                encoders[config.name] = RowEncoder(config, data_config, tokenizer)
            try:
                answer: Any = pack_rows(encoders[config.name].encode_read(rows), first_row)
            except Exception as error:  # the other process raises it
                answer = error
            _send(answers, answer)
    except (EOFError, BrokenPipeError):
        return


def _send(stream: BinaryIO, message: Any) -> None:
    pickle.dump(message, stream, pickle.HIGHEST_PROTOCOL)
    stream.flush()


if __name__ == "__main__":
    main()
