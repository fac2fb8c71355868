"""TRL's own collator reads exported rows with images: pixels, places and what is trained."""

import json

import pytest
from support.vision.image_rows import write_image
from support.vision.models import make_vision_model

from merit_fast.data import DataConfig, DatasetConfig, load_tokenizer_or_processor
from merit_fast.errors import InputError
from merit_fast.export.form import free_names
from merit_fast.export.rows import PartRows
from merit_fast.export.settings import settings_of
from merit_fast.export.stacks.trl import trl_config, trl_forms
from merit_fast.export.survey import survey
from merit_fast.export.write import write_rows
from merit_fast.pipeline.config import RunConfig
from merit_fast.split.config import SplitConfig


def llava(question, *more):
    turns = [("human", f"<image>\n{question}"), ("gpt", "seven"), *more]
    return {
        "image": "a.png",
        "conversations": [{"from": role, "value": text} for role, text in turns],
    }


def part_of(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = DatasetConfig(name, str(path), media=str(folder))
    return PartRows(entry, DataConfig(), "train", tuple(range(len(rows))))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    make_vision_model(folder, "qwen2_5_vl")
    return load_tokenizer_or_processor(str(folder))


@pytest.mark.parametrize("more", [(), (("human", "sure?"), ("gpt", "yes"))])
def test_trl_collates_images_and_texts(tmp_path, processor, more):
    from datasets import load_dataset
    from trl.chat_template_utils import get_training_chat_template
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    write_image(tmp_path / "a.png", 56, 56)
    parts = [
        part_of(tmp_path, "seen", [llava("which digit?", *more)]),
        part_of(tmp_path, "read", [{"prompt_text": "2+2?", "answer_text": "four"}]),
    ]
    columns = {"prompt": "prompt_text", "completion": "answer_text"}
    text = DatasetConfig("read", parts[1].config.path, columns=columns)
    parts[1] = PartRows(text, DataConfig(), "train", (0,))
    surveys = [survey([part]) for part in parts]
    forms = trl_forms(surveys)
    names = free_names(surveys)
    loaded = []
    for part in parts:
        file = tmp_path / f"train_{part.name}.jsonl"
        write_rows(file, [(part, forms[part.name])], names, tmp_path / "images")
        rows = load_dataset(
            "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
        )
        loaded += list(rows.select_columns(forms[part.name].entry["columns"]))
    is_messages = bool(more)
    assert ("messages" in loaded[0]) == is_messages
    collator = DataCollatorForVisionLanguageModeling(
        processor,
        completion_only_loss=not is_messages,
        assistant_only_loss=is_messages,
        chat_template=get_training_chat_template(processor) if is_messages else None,
    )
    batch = collator(loaded)
    assert batch["pixel_values"].shape[0] == 16 and batch["image_grid_thw"].tolist() == [[1, 4, 4]]
    texts = processor.batch_decode(batch["input_ids"])
    assert "which digit?" in texts[0] and texts[0].count("<|image_pad|>") == 4
    assert "2+2?" in texts[1] and "<|image_pad|>" not in texts[1]
    trained = [processor.decode(row[row != -100]) for row in batch["labels"]]
    assert trained[0].startswith("seven") and ("yes" in trained[0]) == is_messages
    assert trained[1].startswith("four")


def test_packing_is_off_where_trl_cannot_pack(tmp_path):
    found = survey([part_of(tmp_path, "seen", [llava("which digit?")])])
    form = trl_forms([found])["seen"]
    mixture = (DatasetConfig("seen", "seen.jsonl"),)
    settings = settings_of(RunConfig("m", mixture), "m", tmp_path)
    user = {"packing": True, "model_name_or_path": "m", "output_dir": "o"}
    assert trl_config([("f", form)], settings, user, 0, num_rows=1)["packing"] is False


def test_a_warm_start_replaces_the_users_model(tmp_path):
    found = survey([part_of(tmp_path, "read", [{"prompt": "2+2?", "completion": "four"}])])
    forms = [("f", trl_forms([found])["read"])]
    user = {"model_name_or_path": "theirs"}
    mixture = (DatasetConfig("read", "read.jsonl"),)
    for warmup, model in ((0.0, "theirs"), (0.1, "warm")):
        run = RunConfig("m", mixture, split=SplitConfig(warmup=warmup))
        config = trl_config(forms, settings_of(run, "warm", tmp_path), user, 0, num_rows=1)
        assert config["model_name_or_path"] == model


def test_tools_next_to_images_are_refused_as_trl_leaves_them_out(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    row = {**llava("which digit?"), "tools": [tool]}
    with pytest.raises(InputError, match="seen: tools: trl leaves it out in a group with images"):
        trl_forms([survey([part_of(tmp_path, "seen", [row])])])
