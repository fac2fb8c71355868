"""The demo's tasks are true, split without leaks and reproducible."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from merit_fast.demo import prepare_mixture
from merit_fast.demo.sources import FAMILIES, SOURCES
from merit_fast.demo.tasks import MAX_ANSWER_CHARACTERS, QUICK_TASKS, build_tasks
from merit_fast.errors import MeritFastError

SEEDS = range(5)

# typed by hand: (task, input, answer)
KNOWN_FACTS = [
    ("country_capital", "Japan", "Tokyo"),
    ("country_capital", "Canada", "Ottawa"),
    ("country_iso2", "Switzerland", "CH"),
    ("country_iso3", "Germany", "DEU"),
    ("country_currency", "United Kingdom", "GBP"),
    ("country_domain", "United Kingdom", ".uk"),
    ("country_calling", "Japan", "+81"),
    ("country_fr", "Germany", "Allemagne"),
    ("country_de", "France", "Frankreich"),
    ("country_es", "Germany", "Alemania"),
    ("country_it", "Sweden", "Svezia"),
    ("language_fr", "Polish", "polonais"),
    ("language_de", "French", "Französisch"),
    ("currency_fr", "Danish Krone", "couronne danoise"),
    ("currency_de", "Swiss Franc", "Schweizer Franken"),
    ("number_words", "677", "six hundred seventy-seven"),
    ("number_ordinal", "42", "forty-second"),
    ("number_hex", "255", "ff"),
    ("verb_past", "bring", "brought"),
    ("verb_gerund", "swim", "swimming"),
    ("verb_third_person", "study", "studies"),
    ("noun_plural", "mouse", "mice"),
    ("adjective_comparative", "good", "better"),
    ("emoji_en", "🐌", "snail"),
    ("emoji_fr", "🐌", "escargot"),
]


def read_files(mixture):
    return {
        Path(row[key]).name: Path(row[key]).read_bytes()
        for row in mixture
        for key in ("path", "eval_path")
    }


def family_of(task):
    return next(name for name, family in FAMILIES.items() if task in family.instructions)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return prepare_mixture(tmp_path_factory.mktemp("demo"), quick=False)


@pytest.mark.parametrize(
    ("quick", "num_datasets", "num_train", "num_held_out"),
    [pytest.param(False, 28, 10, 5, id="full"), pytest.param(True, 8, 10, 8, id="quick")],
)
def test_size(tmp_path, quick, num_datasets, num_train, num_held_out):
    mixture = prepare_mixture(tmp_path / "new" / "folder", quick=quick)
    assert len({row["name"] for row in mixture}) == len(mixture) == num_datasets
    assert {row["name"] for row in mixture} >= set(QUICK_TASKS)
    for row in mixture:
        assert row.keys() == {"name", "path", "eval_path"}
        assert Path(row["path"]).is_absolute() and Path(row["eval_path"]).is_absolute()
        assert len(Path(row["path"]).read_text(encoding="utf-8").splitlines()) == num_train
        assert len(Path(row["eval_path"]).read_text(encoding="utf-8").splitlines()) == num_held_out


def test_every_row_is_a_short_conversation(mixture):
    for row in mixture:
        prompts = []
        for key in ("path", "eval_path"):
            for line in Path(row[key]).read_text(encoding="utf-8").splitlines():
                (messages,) = json.loads(line).values()
                assert [message["role"] for message in messages] == ["system", "user", "assistant"]
                assert all(
                    message["content"].strip() == message["content"] != "" for message in messages
                )
                assert messages[2]["content"].isprintable()
                assert len(messages[2]["content"]) <= MAX_ANSWER_CHARACTERS
                prompts.append(messages[1]["content"])
        assert len(set(prompts)) == len(prompts), row["name"]
        (instruction,) = {prompt.partition("\n")[0] for prompt in prompts}
        assert instruction == FAMILIES[family_of(row["name"])].instructions[row["name"]]


def test_line_has_the_documented_bytes(tmp_path):
    mixture = {row["name"]: row for row in prepare_mixture(tmp_path, quick=True)}
    task = build_tasks(quick=True)["country_fr"]
    text, answer = task.train[0]
    expected = (
        '{"messages": [{"content": "Answer briefly.", "role": "system"}, '
        f'{{"content": "Name the country in French.\\n{text}", "role": "user"}}, '
        f'{{"content": "{answer}", "role": "assistant"}}]}}\n'
    )
    assert Path(mixture["country_fr"]["path"]).read_bytes().startswith(expected.encode())


@pytest.mark.process
def test_same_seed_gives_the_same_bytes_under_another_hash_seed(tmp_path, mixture):
    assert read_files(prepare_mixture(tmp_path / "again", quick=False)) == read_files(mixture)
    code = (
        "import sys, pathlib; from merit_fast.demo import prepare_mixture;"
        "prepare_mixture(pathlib.Path(sys.argv[1]), quick=False)"
    )
    folder = tmp_path / "other"
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, cwd=ROOT, check=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == read_files(mixture)


def test_order_in_the_packages_does_not_matter(monkeypatch):
    expected = build_tasks(quick=False)
    for name, family in FAMILIES.items():

        def reversed_facts(load=family.load):
            return dict(reversed(load().items()))

        monkeypatch.setitem(
            FAMILIES, name, type(family)(family.instructions, reversed_facts, family.split_like)
        )
    assert build_tasks(quick=False) == expected


def test_another_seed_gives_other_rows():
    first = build_tasks(quick=False, seed=0)
    second = build_tasks(quick=False, seed=1)
    assert first.keys() == second.keys()
    for name in first:
        assert set(first[name].held_out) != set(second[name].held_out), name
        assert set(first[name].train) != set(second[name].train), name


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_no_family_trains_on_a_held_out_input(seed, quick):
    train = {}
    held_out = {}
    for name, task in build_tasks(quick=quick, seed=seed, include_copyleft=True).items():
        family = FAMILIES[family_of(name)].split_like or family_of(name)
        train.setdefault(family, set()).update(text for text, _ in task.train)
        held_out.setdefault(family, set()).update(text for text, _ in task.held_out)
    for family in train:
        assert not train[family] & held_out[family], family


def test_families_ask_contradicting_things_of_the_same_inputs():
    tasks = build_tasks(quick=False)
    for family in FAMILIES.values():
        members = [tasks[name] for name in family.instructions if name in tasks]
        for task, other in itertools.permutations(members, 2):
            assert [text for text, _ in task.train] == [text for text, _ in other.train]
            same = sum(a == b for a, b in zip(task.train, other.train, strict=True))
            assert same <= len(task.train) / 2, (task.instruction, other.instruction)


@pytest.mark.parametrize(("task", "text", "answer"), KNOWN_FACTS)
def test_known_fact(task, text, answer):
    assert FAMILIES[family_of(task)].load()[text][task] == answer


def test_known_dates():
    facts = FAMILIES["date"].load()
    # 1950-01-01 was a Sunday; 37 days later is a Tuesday
    assert facts["1950-01-01"]["date_weekday"] == "Sunday"
    assert facts["1950-02-07"] == {
        "date_us": "02/07/1950",
        "date_de": "7. Februar 1950",
        "date_fr": "7 février 1950",
        "date_weekday": "Tuesday",
    }


def test_words_outside_the_lexicon_get_no_invented_form(monkeypatch):
    monkeypatch.setattr("merit_fast.demo.sources.ADJECTIVES", "good procedural blorfy")
    facts = FAMILIES["adjective"].load()
    assert facts["good"] == {"adjective_comparative": "better"}
    assert facts["procedural"] == facts["blorfy"] == {"adjective_comparative": ""}


def test_copyleft_is_off_unless_asked_for(monkeypatch):
    copyleft = {source.package for source in SOURCES if source.is_copyleft}
    assert copyleft == {"num2words"}
    for package in copyleft:
        monkeypatch.setitem(sys.modules, package, None)  # any import of it fails
    assert not {"number_fr", "number_de"} & build_tasks(quick=False).keys()
    with pytest.raises(
        MeritFastError, match="package num2words is not installed; run: pip install num2words"
    ):
        build_tasks(quick=False, include_copyleft=True)


def test_copyleft_tasks_share_the_split_of_the_numbers():
    tasks = build_tasks(quick=False, include_copyleft=True)
    assert len(tasks) == 30
    english, german = (dict(tasks[name].held_out) for name in ("number_words", "number_de"))
    assert english.keys() == german.keys()


def test_every_family_names_its_source():
    assert {family for source in SOURCES for family in source.families} == FAMILIES.keys()


@pytest.mark.parametrize(
    "package", [source.package for source in SOURCES if not source.is_copyleft]
)
def test_missing_package_names_the_extra(monkeypatch, package):
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MeritFastError, match=rf"package {package} is not installed; run: .*\[demo\]"
    ) as caught:
        build_tasks(quick=False)
    assert "\n" not in str(caught.value)


def test_too_few_facts_is_an_error(monkeypatch):
    monkeypatch.setattr("merit_fast.demo.sources.NUM_COUNTRIES", 12)
    with pytest.raises(MeritFastError, match="country: needs 15 facts, the packages hold"):
        build_tasks(quick=False)


def test_importing_the_demo_imports_no_model_or_data_package():
    names = ["torch", "transformers", *(source.package for source in SOURCES)]
    code = f"import sys, merit_fast.demo; assert not set({names!r}) & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
