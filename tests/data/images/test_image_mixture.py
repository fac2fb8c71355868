"""Files of rows with images, as people have them, to examples."""

import base64
import json

import pytest
from support.tiny import make_tokenizer
from support.vision.image_rows import write_image
from support.vision.models import make_qwen_folder

from merit_fast.data import (
    DataConfig,
    DatasetConfig,
    collate,
    dataset_fingerprints,
    load_mixture,
    mixture_fingerprint,
)
from merit_fast.data.images import load_processor
from merit_fast.data.store.build import TokenStore
from merit_fast.errors import InputError
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.progress import SilentProgress


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    images = {"images/a.png": (56, 56), "images/b.png": (84, 56)}
    return make_qwen_folder(tmp_path_factory.mktemp("mixture"), images)


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(str(folder / "model"))


def load(folder, processor, rows, media="images", **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = DatasetConfig(name="a", path=str(path), media=str(folder / media) if media else None)
    (dataset,) = load_mixture([entry], processor, DataConfig(**options), part="train")
    return dataset


def chat(*texts):
    return [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"], texts, strict=True)
    ]


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def text(words):
    return {"type": "text", "text": words}


def same_rows(folder):
    """One row with the image a.png before its question, as several stacks write it."""
    content = (folder / "images" / "a.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return {
        "LLaVA": {"id": 1, "image": "a.png", "conversations": turns("<image>which?", "seven")},
        "LLaMA-Factory": {"messages": chat("<image>which?", "seven"), "images": ["a.png"]},
        "TRL": {
            "images": ["a.png"],
            "prompt": chat("which?", "")[:1],
            "completion": chat("", "seven")[1:],
        },
        "parts": {
            "messages": chat([{"type": "image"}, text("which?")], "seven"),
            "images": ["a.png"],
        },
        "parts with paths": {
            "messages": chat([{"type": "image", "path": "a.png"}, text("which?")], [text("seven")])
        },
        "OpenAI": {
            "messages": chat(
                [{"type": "image_url", "image_url": {"url": url}}, text("which?")], "seven"
            )
        },
    }


@pytest.mark.parametrize(
    "kind", ["LLaVA", "LLaMA-Factory", "TRL", "parts", "parts with paths", "OpenAI"]
)
def test_a_row_gives_one_example_in_whichever_format(folder, processor, kind):
    (expected,) = load(folder, processor, [same_rows(folder)["LLaVA"]]).examples
    (example,) = load(folder, processor, [same_rows(folder)[kind]]).examples
    assert example.input_ids.tolist() == expected.input_ids.tolist()
    assert example.labels.tolist() == expected.labels.tolist()
    found, wanted = example.media.tensors(), expected.media.tensors()
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_text_and_images_mix_in_one_dataset(folder, processor):
    rows = [
        same_rows(folder)["LLaVA"],
        {"conversations": turns("two and two?", "four")},
        {"image": ["b.png", "a.png"], "conversations": turns("<image> or <image>?", "both")},
    ]
    dataset = load(folder, processor, rows)
    batch = collate(dataset.examples, [0, 0, 0], 0)
    assert batch.media["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6], [1, 4, 4]]
    assert batch.media["mm_token_type_ids"].sum(1).tolist() == [4, 0, 10]
    end = processor.tokenizer.eos_token
    answers = [processor.tokenizer.decode(row[row >= 0]) for row in batch.labels]
    assert answers == [f"{answer}{end}" for answer in ("seven", "four", "both")]


def test_paths_count_from_the_folder_of_the_rows_without_media(folder, processor):
    row = {"image": "images/a.png", "conversations": turns("<image>which?", "seven")}
    (example,) = load(folder, processor, [row], media=None).examples
    assert example.media.images[0].file.path == str(folder / "images" / "a.png")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "c.png", "conversations": turns("<image>q", "a")}, "rows.jsonl:2: images[0]: "),
        ({"image": "../rows.jsonl", "conversations": turns("<image>q", "a")}, "no whole image"),
        ({"image": "a.png", "conversations": turns("<image><image>q", "a")}, "rows.jsonl:2: "),
        ({"conversations": turns("<image>q", "a")}, "rows.jsonl:2: "),
    ],
)
def test_a_bad_row_stops_the_load_before_any_batch(folder, processor, row, words):
    with pytest.raises(InputError) as caught:
        load(folder, processor, [same_rows(folder)["LLaVA"], row])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_of_text_refuses_a_mixture_with_images(folder, tmp_path):
    with pytest.raises(InputError, match=r"rows.jsonl:1: .*the model reads none"):
        load(folder, make_tokenizer(tmp_path), [same_rows(folder)["LLaVA"]])


def test_notes_count_rows_with_images_that_were_cut(folder, processor):
    row = {
        "images": ["a.png", "b.png"],
        "conversations": [*turns("<image>q", "a"), *turns("<image>q", "b")],
    }
    (whole,) = load(folder, processor, [row]).examples
    dataset = load(folder, processor, [row], max_length=len(whole.input_ids) - 2)
    assert [len(example.media.images) for example in dataset.examples] == [1]
    assert any("truncated" in note for note in dataset.notes)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_token_store_gives_the_same_batch(folder, processor, tmp_path, num_workers):
    content = base64.b64encode((folder / "images" / "b.png").read_bytes()).decode()
    url = f"data:image/png;base64,{content}"
    rows = [
        same_rows(folder)["LLaVA"],
        {"conversations": turns("two and two?", "four")},
        {"images": [url, "a.png"], "conversations": turns("<image> or <image>?", "both")},
    ]
    expected = collate(load(folder, processor, rows).examples, [0, 0, 0], 0)
    entry = DatasetConfig(name="a", path=str(folder / "rows.jsonl"), media=str(folder / "images"))
    for _ in range(2):  # built, then opened
        store = TokenStore(tmp_path, {"a": "fingerprint"})
        (dataset,) = load_mixture(
            [entry], processor, DataConfig(), part="train", store=store, num_workers=num_workers
        )
        batch = collate(dataset.examples, [0, 0, 0], 0)
        assert (batch.input_ids == expected.input_ids).all()
        assert (batch.labels == expected.labels).all()
        assert batch.media.keys() == expected.media.keys()
        assert all((batch.media[name] == value).all() for name, value in expected.media.items())


def test_a_template_that_rewrites_history_shows_each_answer_its_images(folder, processor, tmp_path):
    template = tmp_path / "rewrites.jinja"
    template.write_text(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}"
        "{% if message.role == 'assistant' and not loop.last %}"
        "{{ message.content.split('</think>')[-1] }}{% else %}{{ message.content }}{% endif %}"
        "{% else %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<|image_pad|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {
        "images": ["a.png", "b.png", "a.png"],
        "conversations": [
            *turns("<image>q", "<think>hm</think>one"),
            *turns("q", "<think>so</think>two"),
            *turns("<image><image>q", "<think>ah</think>three"),
        ],
    }
    examples = load(folder, processor, [row], chat_template=str(template)).examples
    assert [len(example.media.images) for example in examples] == [1, 1, 3]
    assert [example.tree for example in examples] == [None] * 3
    batch = collate(examples, [0, 0, 0], 0)
    assert batch.media["image_grid_thw"].tolist() == [[1, 4, n] for n in (4, 4, 4, 6, 4)]
    answers = [processor.tokenizer.decode(row[row >= 0]) for row in batch.labels]
    words = ["<think>hm</think>one", "<think>so</think>two", "<think>ah</think>three"]
    assert answers == [f"{answer}<|im_end|>" for answer in words]


def test_a_template_that_leaves_out_images_is_refused(folder, processor, tmp_path):
    template = tmp_path / "blind.jinja"
    template.write_text(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rule = r"rows.jsonl:1: the chat template must write <\|image_pad\|> for each of 1 images, got 0"
    with pytest.raises(InputError, match=rule):
        load(folder, processor, [same_rows(folder)["LLaVA"]], chat_template=str(template))


@pytest.mark.parametrize("media", ["images", None])
def test_the_fingerprint_of_a_mixture_covers_its_images(folder, processor, tmp_path, media):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(same_rows(folder)["LLaVA"]) + "\n")
    model = folder / "model"
    text_model = tmp_path / "text"
    make_tokenizer(text_model)
    write_image(tmp_path / "images" / "a.png", 56, 56)
    entry = DatasetConfig(name="a", path=str(rows), media=media and str(tmp_path / media))

    def fingerprints(model):
        data = DataConfig()
        whole = mixture_fingerprint([entry], data, str(model))
        return whole, dataset_fingerprints([entry], data, str(model), part="train")["a"]

    before, text_before = fingerprints(model), fingerprints(text_model)
    assert fingerprints(model) == before
    write_image(tmp_path / "images" / "a.png", 56, 56, seed=1)
    after = fingerprints(model)
    assert after[0] != before[0] and after[1] != before[1]
    assert fingerprints(text_model) == text_before


def test_a_kept_scan_sees_that_an_image_has_changed(folder, tmp_path):
    for name in ("one.png", "two.png"):
        write_image(tmp_path / "media" / name, 56, 56)
    rows = [
        {"image": name, "conversations": turns("<image>what?", "a dot")}
        for name in ("one.png", "two.png")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"name": "a", "path": str(tmp_path / "rows.jsonl"), "media": str(tmp_path / "media")}
    file = tmp_path / "run.yml"
    run = {"model": str(folder / "model"), "mixture": [entry], "output": str(tmp_path / "out")}
    file.write_text(json.dumps(run))

    def notes():
        outputs = Outputs(read_run_config(file), "")
        return RunData(outputs, SilentProgress()).rows.select("train")["a"].notes

    assert notes() == ("1 row equal to an earlier row (data.duplicates: drop removes them)",)
    write_image(tmp_path / "media" / "two.png", 84, 56)
    assert notes() == ()
