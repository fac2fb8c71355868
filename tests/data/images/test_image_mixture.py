"""Files of rows with images, as people have them, to examples."""

import base64
import json

import pytest
from support.tiny import make_tokenizer
from support.vision import make_vision_model, write_image

from merit_fast.data import DataConfig, DatasetConfig, collate, load_mixture
from merit_fast.data.images import load_processor
from merit_fast.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    make_vision_model(folder / "model", "qwen2_5_vl")
    write_image(folder / "images" / "a.png", 56, 56)
    write_image(folder / "images" / "b.png", 84, 56)
    return folder


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
