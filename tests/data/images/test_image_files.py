"""Image files of rows: found, checked before they are used, and decoded as transformers does."""

import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as pillow
from support.vision.image_rows import write_image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from merit_fast.data.conversation import Image
from merit_fast.data.images import find_image, image_fingerprint, images_hash
from merit_fast.errors import InputError
from merit_fast.manifests.hashes import HashCache

WHERE = "rows.jsonl:3: images[0]"


def find(path, folder):
    return find_image(Image(path=str(path)), WHERE, Path(folder))


def refused(image, folder, *words):
    with pytest.raises(InputError) as caught:
        find_image(image, WHERE, Path(folder))
    message = str(caught.value)
    assert message.startswith(WHERE) and "\n" not in message
    assert all(word in message for word in words), message


MODES = {
    "png": ("RGB", "L", "P", "1", "RGBA", "LA"),
    "jpg": ("RGB", "L", "1", "CMYK"),
    "webp": ("RGB", "L", "RGBA"),
    "gif": ("RGB", "L", "P", "RGBA"),
    "bmp": ("RGB", "L", "P", "1"),
    "tiff": ("RGB", "L", "P", "1", "RGBA", "CMYK", "LA"),
}


@pytest.mark.parametrize(
    ("suffix", "mode"), [(suffix, mode) for suffix, modes in MODES.items() for mode in modes]
)
def test_pixels_are_those_that_transformers_reads(tmp_path, suffix, mode):
    file = tmp_path / f"a.{suffix}"
    source = pillow.open(write_image(tmp_path / "source.png", 13, 7))
    source.convert(mode).save(file)
    image = find(file.name, tmp_path)
    assert image.size == (13, 7)
    assert np.array_equal(np.asarray(image.pixels()), np.asarray(load_image(str(file))))
    content = find_image(Image(content=file.read_bytes()), WHERE, tmp_path)
    assert np.array_equal(np.asarray(content.pixels()), np.asarray(image.pixels()))


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tiff"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_shows_white_as_transformers_has_it(tmp_path, name, mode):
    """A black drawing on a transparent ground would be black on black otherwise."""
    ink = np.zeros((40, 40, 4), np.uint8)
    ink[10:30, 10:30, 3] = 255
    ink[0, :, 3] = 127
    drawing = pillow.fromarray(ink).convert(mode)
    drawing.save(tmp_path / name)
    pixels = np.asarray(find(name, tmp_path).pixels())
    with pillow.open(tmp_path / name) as opened:
        assert np.array_equal(pixels, convert_to_rgb(opened, return_numpy=True))
    assert (pixels[20, 20] == 0).all() and (pixels[35, 35] == 255).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_cameras_say(tmp_path, orientation, suffix):
    exif = pillow.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{suffix}"
    pillow.open(write_image(tmp_path / "b.png", 20, 10)).save(file, exif=exif)
    image = find(file.name, tmp_path)
    expected = load_image(str(file))
    assert image.size == expected.size
    assert np.array_equal(np.asarray(image.pixels()), np.asarray(expected))


def test_paths_count_from_the_folder_and_may_be_absolute(tmp_path):
    write_image(tmp_path / "deep" / "a b:c.png", 5, 6)
    assert find("deep/a b:c.png", tmp_path).size == (5, 6)
    assert find(tmp_path / "deep" / "a b:c.png", "/nowhere").size == (5, 6)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing.png", ["missing.png is not there", "media"]),
        (".", ["is a folder"]),
        ("a" * 9000, ["data:image/png;base64,"]),
        ("a.png/b.png", ["is not there"]),
    ],
)
def test_images_that_are_no_files_are_refused(tmp_path, path, words):
    refused(Image(path=path), tmp_path, *words)


def test_an_image_without_path_and_bytes_is_refused(tmp_path):
    refused(Image(), tmp_path, "neither")
    refused(Image(path=""), tmp_path, "neither")
    refused(Image(content=b""), tmp_path, "no whole image")


@pytest.mark.parametrize(("name", "mode"), [("a.png", "I;16"), ("a.tiff", "I"), ("a.tiff", "F")])
def test_more_than_eight_bits_are_refused(tmp_path, name, mode):
    """Nearly all of such an image would be white."""
    values = np.linspace(0, 65535, 400).reshape(20, 20)
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    pillow.fromarray(values.astype(dtype)).save(tmp_path / name)
    refused(Image(path=name), tmp_path, name, "8 bits", mode)
    refused(Image(content=(tmp_path / name).read_bytes()), tmp_path, "8 bits", mode)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 0.99])
def test_a_file_that_ends_early_is_refused_without_a_row_being_trained(tmp_path, suffix, share):
    whole = write_image(tmp_path / f"whole.{suffix}", 60, 50).read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(whole[: int(len(whole) * share)])
    refused(Image(path=f"cut.{suffix}"), tmp_path, f"cut.{suffix}", "no whole image")
    assert find(f"whole.{suffix}", tmp_path).size == (60, 50)


def test_bytes_behind_the_end_of_a_whole_file_are_no_error(tmp_path):
    file = write_image(tmp_path / "a.jpg", 60, 50)
    file.write_bytes(file.read_bytes() + b"trailing bytes of a camera")
    assert find("a.jpg", tmp_path).pixels().size == (60, 50)


def test_text_under_an_image_name_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("<html>404</html>")
    refused(Image(path="a.png"), tmp_path, "a.png", "no whole image")


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", 60, 50)
    monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", 2999)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(Image(path="a.png"), tmp_path, "2999", "60 x 50")
    monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", 1000)
    refused(Image(path="a.png"), tmp_path, "a.png")


@pytest.mark.parametrize("change", ["gone", "other size", "same bytes count, other shape"])
def test_a_file_that_changed_since_the_rows_were_read_is_refused(tmp_path, change):
    file = write_image(tmp_path / "a.bmp", 60, 50)
    image = find("a.bmp", tmp_path)
    if change == "gone":
        file.unlink()
    elif change == "other size":
        write_image(file, 61, 50)
    else:
        write_image(file, 50, 60)
        file.write_bytes(file.read_bytes()[: image.num_bytes].ljust(image.num_bytes, b"\0"))
    with pytest.raises(InputError, match=re.escape(str(file))):
        image.pixels()


def test_the_fingerprint_of_images_covers_bytes_and_order_but_no_paths(tmp_path):
    for folder in ("one", "two"):
        for seed in (0, 1):
            write_image(tmp_path / folder / f"{seed}.png", 8, 8, seed=seed)
    one, two = ([find(f"{i}.png", tmp_path / name) for i in (0, 1)] for name in ("one", "two"))
    assert image_fingerprint(one) == image_fingerprint(two)
    assert image_fingerprint(one) != image_fingerprint(one[::-1])
    content = [find_image(Image(content=Path(i.path).read_bytes()), WHERE, tmp_path) for i in one]
    assert image_fingerprint(content) != image_fingerprint(content[::-1])
    write_image(tmp_path / "two" / "1.png", 8, 8, seed=2)
    assert image_fingerprint(one) != image_fingerprint(two)


def test_the_hash_of_a_folder_covers_names_and_bytes_but_not_its_place(tmp_path):
    for folder in ("one", "two"):
        for seed in (0, 1):
            write_image(tmp_path / folder / "deep" / f"{seed}.png", 8, 8, seed=seed)
    one, two = tmp_path / "one", tmp_path / "two"
    assert images_hash(one) == images_hash(two)
    (two / "rows.jsonl").write_text("{}")
    assert images_hash(one) != images_hash(two)
    assert images_hash(one, only_images=True) == images_hash(two, only_images=True)
    write_image(two / "deep" / "1.png", 8, 8, seed=2)
    assert images_hash(one) != images_hash(two)
    os.replace(one / "deep" / "0.png", one / "0.png")
    assert images_hash(one) != images_hash(two, only_images=True)


def test_a_cache_hashes_a_folder_of_images_once(tmp_path, monkeypatch):
    files = [write_image(tmp_path / f"{seed}.png", 8, 8, seed=seed) for seed in range(3)]
    for file in files:
        os.utime(file, ns=(10**18, 10**18))
    first = HashCache({})
    expected = images_hash(tmp_path, first)
    assert expected == images_hash(tmp_path)
    later = HashCache(first.fresh)
    monkeypatch.setattr("merit_fast.manifests.hashes.checksum", lambda file: pytest.fail(str(file)))
    assert images_hash(tmp_path, later) == expected
    monkeypatch.undo()
    write_image(files[0], 8, 8, seed=7)
    os.utime(files[0], ns=(10**18, 2 * 10**18))
    assert images_hash(tmp_path, later) == images_hash(tmp_path) != expected
    assert images_hash(tmp_path, HashCache(first.fresh, whole=True)) == images_hash(tmp_path)
