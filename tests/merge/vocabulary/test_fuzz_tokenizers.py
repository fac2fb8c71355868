"""Damaged tokenizer and config files: a merge, or one line before anything is written."""

import copy
import json
import random
import shutil

import pytest
from support.merge.vocabulary.models import OWN, make_model

from merit_fast.errors import InputError
from merit_fast.merge import merge_models

JUNK = [
    *(None, True, -1, 0, 3, 2**40, 1.5, float("inf"), "", "x" * 50, "a b c", "\ud800"),
    *([], {}, [[]], ["a"], {"a": {}}, {"content": 3}, {"content": "a"}, ...),
]
OPTIONS = ["union", "base", "ids", None, {"source": "union", "pad_to_multiple_of": 4}]


def places(value, place=()):
    """Every place inside nested lists and mappings."""
    yield place
    if not isinstance(value, (dict, list)):
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield from places(inner, (*place, key))


def damaged(value, random_source):
    """The value with one place replaced or removed."""
    place = random_source.choice(list(places(value)))
    junk = copy.deepcopy(random_source.choice(JUNK))
    if not place:
        return None if junk is ... else junk
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if junk is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = junk
    return value


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_end_in_one_line(tmp_path, seed):
    random_source = random.Random(seed)
    first = make_model(tmp_path / "a", ("<x>",), seed=1, bos_token_id=1, eos_token_id=[2])
    second = make_model(tmp_path / "b", ("<y>", "<x>"), own=OWN[::-1], rows=8, seed=2)
    (first.path / "added_tokens.json").write_text('{"<x>": 6}')
    paths = [first.path, second.path]
    originals = {file: file.read_bytes() for path in paths for file in path.glob("*.json")}
    outcomes = set()
    for _ in range(25):
        for file, content in originals.items():
            file.write_bytes(content)
        for file in random_source.sample(list(originals), 2):
            file.write_text(json.dumps(damaged(json.loads(file.read_bytes()), random_source)))
        tokenizer = random_source.choice([*OPTIONS, str(second.path)])
        template = random_source.choice([None, "auto", "chatml"])
        options = {"tokenizer": tokenizer, "chat_template": template, "fsync": False}
        try:
            merge_models(paths, out=tmp_path / "out", **options)
            outcomes.add("merged")
            shutil.rmtree(tmp_path / "out")
        except InputError as error:
            outcomes.add("refused")
            assert str(error).isprintable() and len(str(error)) < 2000
            assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert outcomes == {"merged", "refused"}
