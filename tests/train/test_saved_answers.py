"""A branch and a merge are asked as their rows were, and stop where their answers ended."""

import json
import shutil

import pytest
import torch
from support.tiny import CHATML, chat_row, make_model, make_tokenizer

from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer
from merit_fast.data.saved import read_data_options
from merit_fast.data.stops import require_stops
from merit_fast.errors import InputError
from merit_fast.merge import merge_models
from merit_fast.progress import SilentProgress
from merit_fast.train import TrainConfig
from merit_fast.train.stage import BranchJob, train_branch

OTHER_END = "<|im_start|>"  # where the base stops: no answer ends there
TRAIN = TrainConfig(epochs=40, batch_size=4, learning_rate=1e-2, dtype="fp32", kernels="eager")


class Notes(SilentProgress):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base without a chat template, which stops at another token than ChatML's answers."""
    folder = tmp_path_factory.mktemp("base")
    model = make_model(folder)
    model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer = make_tokenizer(folder)
    tokenizer.chat_template = None
    tokenizer.eos_token = tokenizer.pad_token = OTHER_END
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "chatml.jinja"
    file.write_text(CHATML)
    return str(file)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    facts = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Peru": "Lima"}
    lines = [json.dumps(chat_row("Give the capital.", q, a)) for q, a in facts.items()]
    file.write_text("\n".join(lines * 2))
    return str(file)


def load(base, rows, data):
    return load_mixture([DatasetConfig("d", rows)], load_tokenizer(str(base)), data, part="train")


def branch(base, rows, data, out, group=0):
    out.mkdir()
    datasets = tuple(load(base, rows, data))
    job = BranchJob(f"merit-{group}", "merit", group, datasets, str(base), "f", "f", data=data)
    train_branch(job, TRAIN, out, SilentProgress())
    return out


@pytest.fixture(scope="module")
def branches(base, rows, template, tmp_path_factory):
    folder = tmp_path_factory.mktemp("branches")
    data = DataConfig(chat_template=template, max_length=64)
    return [branch(base, rows, data, folder / str(k), k) for k in range(2)]


def answer(folder, question, most=12):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": f"Give the capital. {question}"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=most, do_sample=False)
    return tokenizer.decode(written[0, prompt["input_ids"].shape[1] :])


def test_a_branch_and_a_merge_answer_and_stop(branches, tmp_path):
    merge_models(branches, out=tmp_path / "merged")
    for folder in (branches[0], tmp_path / "merged"):
        assert answer(folder, "Italy") == "Rome<|im_end|>"
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.chat_template == CHATML
        assert tokenizer.eos_token == "<|im_end|>"
        generation = json.loads((folder / "generation_config.json").read_text())
        assert set(generation["eos_token_id"]) == {0, tokenizer.eos_token_id}


def test_the_base_itself_would_not_stop(base, branches, tmp_path):
    shutil.copytree(branches[0], tmp_path / "model")
    shutil.copy(base / "generation_config.json", tmp_path / "model")
    assert len(answer(tmp_path / "model", "Italy", 12)) > len("Rome<|im_end|>")


def test_plain_rows_give_a_plain_template(base, rows, tmp_path):
    folder = branch(base, rows, DataConfig(chat_template="plain"), tmp_path / "plain")
    assert answer(folder, "Italy") == f"Rome{OTHER_END}"
    assert load_tokenizer(str(folder)).eos_token == OTHER_END  # the template reads it


def test_a_tokenizer_with_a_template_is_saved_as_it_was(tiny_model, rows, tmp_path):
    folder = branch(tiny_model, rows, DataConfig(), tmp_path / "own")
    expected = tmp_path / "expected"
    load_tokenizer(str(tiny_model)).save_pretrained(expected)
    for file in expected.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name
    generation = (tiny_model / "generation_config.json").read_text()
    ends = json.loads(generation)["eos_token_id"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == ends


def test_no_template_is_refused_before_the_model_is_loaded(base, rows, template, tmp_path):
    datasets = tuple(load(base, rows, DataConfig(chat_template=template)))
    job = BranchJob("b", "merit", 0, datasets, str(base), "f", "f")
    with pytest.raises(InputError, match="no chat template"):
        train_branch(job, TRAIN, tmp_path, SilentProgress())


def test_models_tell_how_their_rows_became_tokens(branches, tmp_path):
    config, is_known = read_data_options(branches)
    assert is_known and config == DataConfig(max_length=64)
    assert read_data_options([tmp_path]) == (DataConfig(), False)
    assert read_data_options(branches, ["max_length=9"])[0].max_length == 9


def test_models_that_disagree_need_an_option(branches, tmp_path):
    shutil.copytree(branches[1], tmp_path / "other")
    file = tmp_path / "other" / "data.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_length": 32}))
    models = [branches[0], tmp_path / "other"]
    with pytest.raises(
        InputError, match=r"data\.json: max_length: must be 64 .* got 32; .*data\.m"
    ):
        read_data_options(models)
    assert read_data_options(models, ["max_length=32"])[0].max_length == 32
    file.write_text("{")
    with pytest.raises(InputError, match=r"data\.json: must be JSON"):
        read_data_options(models)


def test_a_merge_of_models_with_unlike_templates_says_whose_it_keeps(branches, tmp_path):
    shutil.copytree(branches[1], tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "other" / "generation_config.json").write_text('{"eos_token_id": 7}')
    notes = Notes()
    merge_models([branches[0], tmp_path / "other"], out=tmp_path / "merged", progress=notes)
    assert [("chat template" in text, "end tokens" in text) for text in notes.texts[:2]] == [
        (True, False),
        (False, True),
    ]
    assert all(str(branches[0]) in text and "other" in text for text in notes.texts[:2])
    same = Notes()
    merge_models(branches, out=tmp_path / "same", progress=same)
    assert not any("chat template" in text or "end tokens" in text for text in same.texts)


STRAY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if m['content'] != 'Rome' %}<|im_end|>{% else %}<|im_start|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_an_answer_that_ends_in_another_token_is_refused(base, rows, tmp_path):
    file = tmp_path / "stray.jinja"
    file.write_text(STRAY)
    data = DataConfig(chat_template=str(file))
    tokenizer = load_tokenizer(str(base))
    configs = [DatasetConfig("d", rows)]
    with pytest.raises(InputError, match=r"dataset d: every answer must end in .*im_end.*got"):
        datasets = load_mixture(configs, tokenizer, data, part="train")
        require_stops(datasets, configs, data, tokenizer)


def test_answers_of_a_store_and_in_memory_end_alike(base, rows, template):
    from merit_fast.data.stops import last_answer_ids

    data = DataConfig(chat_template=template)
    (dataset,) = load(base, rows, data)
    tokenizer = load_tokenizer(str(base))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for examples in (dataset.examples, tuple(dataset.examples), dataset.select([2, 5]).examples):
        assert last_answer_ids(examples, 2048).tolist() == [end]
        assert last_answer_ids(examples, 4).tolist() == []
    require_stops([dataset], [DatasetConfig("d", rows)], data, tokenizer)
