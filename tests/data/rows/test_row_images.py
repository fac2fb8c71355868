"""Images of rows: all ways to give one, their places in messages, and markers without media."""

import base64
import io

import pytest
from PIL import Image as Pillow
from support.data.one_row import read, refusal
from support.data.rows import assistant, user, write

from merit_fast.data.conversation import Image
from merit_fast.data.sources import Source, read_rows

IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def png(size=(3, 2), mode="RGB"):
    buffer = io.BytesIO()
    Pillow.new(mode, size).save(buffer, format="PNG")
    return buffer.getvalue()


PLACES = {
    "llava": (
        {
            "id": "1",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat?"},
                {"from": "gpt", "value": "a cat"},
            ],
        },
        [[IMAGE, text("\nwhat?")], "a cat"],
    ),
    "marker at the end": (
        {"messages": [user("what? <image>"), assistant("x")], "images": ["a.png"]},
        [[text("what? "), IMAGE], "x"],
    ),
    "several, in several turns": (
        {
            "messages": [
                user("<image> and <image>"),
                assistant("x"),
                user("<image>"),
                assistant("<image> it is"),
            ],
            "images": ["a.png", "b.png", "c.png", "d.png"],
        },
        [[IMAGE, text(" and "), IMAGE], "x", [IMAGE], [IMAGE, text(" it is")]],
    ),
    "no place: before the first user text": (
        {
            "messages": [{"role": "system", "content": "s"}, user("what?"), assistant("x")],
            "images": ["a.png", "b.png"],
        },
        ["s", [IMAGE, IMAGE, text("what?")], "x"],
    ),
    "parts filled in order": (
        {
            "messages": [user([text("left"), IMAGE, text("right"), IMAGE]), assistant("x")],
            "images": ["a.png", "b.png"],
        },
        [[text("left"), IMAGE, text("right"), IMAGE], "x"],
    ),
    "parts with their own": (
        {
            "messages": [
                user([{"type": "image", "path": "a.png", "text": None}, text("what?")]),
                assistant("x"),
                user([{"type": "image_url", "image_url": {"url": "b.png"}}]),
                assistant([text("y")]),
            ]
        },
        [[IMAGE, text("what?")], "x", [IMAGE], "y"],
    ),
    "own and waiting parts": (
        {
            "messages": [user([IMAGE, {"type": "image", "url": "b.png"}, IMAGE]), assistant("x")],
            "images": ["a.png", "c.png"],
        },
        [[IMAGE, IMAGE, IMAGE], "x"],
    ),
    "marker within a text part": (
        {"messages": [user([text("a <image> b")]), assistant("x")], "image": "a.png"},
        [[text("a "), IMAGE, text(" b")], "x"],
    ),
    "alpaca": (
        {"instruction": "<image>what?", "input": "", "output": "x", "images": ["a.png"]},
        [[IMAGE, text("what?")], "x"],
    ),
    "prompt": (
        {"prompt": "what?", "completion": "x", "image": "a.png"},
        [[IMAGE, text("what?")], "x"],
    ),
    "empty column": (
        {"prompt": "what?", "completion": "<image>", "images": []},
        ["what?", "<image>"],
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_images_get_their_places(name):
    row, expected = PLACES[name]
    conversation = read(row)
    contents = [message.for_template()["content"] for message in conversation.messages]
    assert contents == expected
    num_places = sum(part == IMAGE for content in expected for part in content)
    paths = ["a.png", "b.png", "c.png", "d.png"][:num_places]
    assert conversation.images == tuple(map(Image, paths))


CONTENT = png()
ENCODED = base64.b64encode(CONTENT).decode()
SOURCES = {
    "path": ("a/b.png", Image("a/b.png")),
    "file url": ("file:///a/b.png", Image("/a/b.png")),
    "struct of a path": ({"bytes": None, "path": "b.png"}, Image("b.png")),
    "struct of bytes": ({"bytes": CONTENT, "path": "b.png"}, Image(content=CONTENT)),
    "bytes": (CONTENT, Image(content=CONTENT)),
    "data url": (f"data:image/png;base64,{ENCODED}", Image(content=CONTENT)),
    "data url in capitals": (f"DATA:IMAGE/PNG;BASE64,{ENCODED}", Image(content=CONTENT)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_images_come_in_every_shape(name):
    given, expected = SOURCES[name]
    for row in (
        {"prompt": "q", "completion": "a", "image": given},
        {"prompt": "q", "completion": "a", "images": [given]},
        {"messages": [user([{"type": "image", "image": given}]), assistant("a")]},
    ):
        assert read(row).images == (expected,)


def test_part_keys_for_content():
    for part in ({"base64": ENCODED}, {"bytes": CONTENT}, {"url": SOURCES["data url"][0]}):
        row = {"messages": [user([{"type": "image", **part}]), assistant("a")]}
        assert read(row).images == (Image(content=CONTENT),)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "F"])
def test_decoded_images_become_files_of_their_pixels(mode):
    image = Pillow.new(mode, (3, 2))
    image.putpixel((1, 1), (7,) * len(image.getbands()) if len(image.getbands()) > 1 else 1)
    [read_back] = read({"prompt": "q", "completion": "a", "images": [image]}).images
    decoded = Pillow.open(io.BytesIO(read_back.content))
    assert (decoded.mode, decoded.size) == (image.mode, image.size)
    assert decoded.tobytes() == image.tobytes()


WRONG = {
    "fewer images": (
        {"messages": [user("<image><image>"), assistant("a")], "images": ["a.png"]},
        "must have as many images as places for them (<image> in a text, or a part of the type "
        "image), got 1 for 2",
    ),
    "more images": (
        {"messages": [user("<image>"), assistant("a")], "images": ["a.png", "b.png"]},
        "got 2 for 1",
    ),
    "part without an image": ({"messages": [user([IMAGE]), assistant("a")]}, "got 0 for 1"),
    "marker next to own parts": (
        {"messages": [user([{"type": "image", "path": "a"}, text("<image>")]), assistant("a")]},
        "got 0 for 1",
    ),
    "network": (
        {"prompt": "q", "completion": "a", "image": "https://x.org/a.png"},
        "image: must be a file or a data URL, as a run loads no image from the network, "
        "got 'https://x.org/a.png'",
    ),
    "network in a part": (
        {
            "messages": [
                user([{"type": "image_url", "image_url": {"url": "http://x.org/a"}}]),
                assistant("a"),
            ]
        },
        "messages[0].content[0].image_url.url: must be a file or a data URL",
    ),
    "data url": (
        {"prompt": "q", "completion": "a", "images": ["data:image/png,abc"]},
        "images[0]: must be data:TYPE;base64,CONTENT where it is a data URL",
    ),
    "base64": (
        {"prompt": "q", "completion": "a", "images": ["data:image/png;base64,a-b"]},
        "images[0]: must be base64, got 'a-b'",
    ),
    "number": (
        {"prompt": "q", "completion": "a", "images": [3]},
        "images[0]: must be an image: a path, a data URL, bytes, or {bytes, path}, got 3",
    ),
    "further keys": (
        {"prompt": "q", "completion": "a", "image": {"path": "a.png", "crop": [0, 0, 1, 1]}},
        "image: must be an image: a path, a data URL, bytes, or {bytes, path}, got {'path'",
    ),
    "detail": (
        {
            "messages": [
                user([{"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}]),
                assistant("a"),
            ]
        },
        "messages[0].content[0].image_url.detail: must be absent or listed under "
        "data.ignore_columns, as nothing reads it, got 'high'",
    ),
    "no path": ({"prompt": "q", "completion": "a", "images": [""]}, "images[0]: must be an image"),
    "two sources": (
        {"messages": [user([{"type": "image", "path": "a", "url": "b"}]), assistant("a")]},
        "messages[0].content[0]: must name one image, got path, url",
    ),
    "no user": (
        {"messages": [{"role": "system", "content": "s"}, assistant("a")], "images": ["a.png"]},
        "must have a user message for its images, found none",
    ),
    "both columns": (
        {"prompt": "q", "completion": "a", "images": ["a.png"], "image": "b.png"},
        "column image of dataset d: must be named under columns",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_images_are_refused(name):
    row, rule = WRONG[name]
    message = refusal(row)
    assert message.startswith("here: ") and rule in message


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_markers_without_media_are_refused_but_in_answers(kind):
    marker = f"<{kind}>"
    for row in (
        {"prompt": f"{marker}\nwhat?", "completion": "a"},
        {"messages": [{"role": "system", "content": marker}, user("q"), assistant("a")]},
        {"instruction": "q", "input": marker, "output": "a", f"{kind}s": []},
    ):
        message = refusal(row)
        assert f"must come with {kind}s where its text holds {marker}, found none" in message
        plain = read(row, columns={f"{kind}s": ""})
        assert not plain.images and any(marker in m.content for m in plain.messages)
    for words in (f"<{kind} src='a'>", f"< {kind}>", kind):
        assert read({"prompt": words, "completion": marker}).messages[0].content == words


def test_markers_are_no_plain_text_where_the_row_brings_images():
    row = {"prompt": "<image>", "completion": "a", "images": ["a.png"]}
    assert "must come with images" in refusal(row, columns={"images": ""})
    row["prompt"] = "q"
    assert read(row, columns={"images": ""}).images == ()


def test_mapped_images():
    row = {"prompt": "q", "completion": "a", "picture": "a.png"}
    assert read(row, columns={"images": "picture"}).images == (Image("a.png"),)
    assert "column picture of dataset d" in refusal(row)


def test_image_structs_of_parquet_are_read(tmp_path):
    rows = [
        {
            "messages": [user("<image>"), assistant("a")],
            "images": [{"bytes": CONTENT, "path": "a"}],
        },
        {"messages": [user("<image>"), assistant("a")], "images": [{"bytes": None, "path": "b"}]},
        {"messages": [user("q"), assistant("a")], "images": None},
    ]
    path = write(tmp_path / "rows.parquet", rows)
    found = [read(row).images for _, row in read_rows(Source(path))]
    assert found == [(Image(content=CONTENT),), (Image("b"),), ()]
