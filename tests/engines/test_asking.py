"""Questions to a stack's own environment: its answer, or one line that says why there is none."""

import sys

import pytest

from merit_fast.engines.asking import ask
from merit_fast.errors import MeritFastError


def test_the_answer_comes_through_whatever_the_imports_print():
    script = "import sys\nprint('a banner')\nanswer = {'words': sys.argv[1:], 'none': None}\n"
    assert ask("trl", sys.executable, script, "a b", "ü") == {"words": ["a b", "ü"], "none": None}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import no_such_stack", "No module named 'no_such_stack'"),
        ("raise SystemExit", "no output"),
    ],
)
def test_an_environment_that_cannot_answer_is_named_with_its_last_words(script, reason):
    with pytest.raises(MeritFastError) as caught:
        ask("swift", sys.executable, script)
    message = str(caught.value)
    assert message.startswith(f"train.engine: swift cannot be imported by {sys.executable}: ")
    assert message.endswith(reason) and "\n" not in message
