"""Image files of rows: where they lie, whether they are whole, and their pixels."""

from __future__ import annotations

import errno
import hashlib
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from merit_fast.data.conversation import Image
from merit_fast.errors import InputError, one_line, show
from merit_fast.manifests.hashes import HashCache, checksum, folder_checksum, list_files

if TYPE_CHECKING:
    from PIL.Image import Image as Pixels

_ORIENTATION = 0x0112  # Exif: how a camera was held
_TURNED = (5, 6, 7, 8)  # orientations that exchange width and height
_DEEP_MODES = ("I", "F")  # more than 8 bits: I, I;16, I;16B, F
_TAIL_BYTES = 16
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageFile:
    """An image that was found and checked: a file, or the bytes of one.

    Attributes:
        path: the file; None for bytes.
        content: the encoded bytes; None for a file.
        num_bytes: size of the file or of the bytes.
        size: (width, height) in pixels, turned as the image is shown.
    """

    path: str | None
    content: bytes | None
    num_bytes: int
    size: tuple[int, int]

    @property
    def name(self) -> str:
        """The image's name in error messages."""
        return self.path or f"image of {self.num_bytes} bytes in a row"

    def pixels(self) -> Pixels:
        """Decodes the image: turned as it is shown, in RGB, on white where it is transparent.

        Raises:
            InputError: the file is missing or damaged, or not the one that was checked.
        """
        from PIL import Image as pillow
        from PIL import ImageOps

        name = self.name
        if self.path is not None and _num_bytes(self.path) != self.num_bytes:
            raise InputError(f"{name}: is no longer the file that the rows were read with")
        try:
            with pillow.open(_source(self.path, self.content)) as opened:
                image = _in_rgb(ImageOps.exif_transpose(opened))
        except Exception as error:  # each format's decoder raises its own kinds
            raise InputError(f"{name}: cannot be decoded: {one_line(error)}") from None
        if image.size != self.size:
            rule = f"must have {_shape(self.size)} pixels as when the rows were read"
            raise InputError(f"{name}: {rule}, got {_shape(image.size)}")
        return image


def find_image(image: Image, where: str, folder: Path) -> ImageFile:
    """Finds an image of a row and checks its header and its end, without decoding it.

    A file whose end is not the one of its format is decoded, which shows whether it is whole.

    Args:
        image: as the row names it.
        where: file, line and the image's place in the row, for error messages.
        folder: relative paths count from here.

    Raises:
        InputError: the image is missing, broken, too large, or of more than 8 bits per channel.
    """
    if image.content is not None:
        return _checked(None, image.content, f"{where}: its bytes")
    if not image.path:
        raise InputError(f"{where}: must be a path or the bytes of an image, got neither")
    path = _locate(image.path, where, folder)
    return _checked(str(path), None, f"{where}: {path}")


def image_fingerprint(
    images: Iterable[ImageFile], file_hash: Callable[[Path], str] = checksum
) -> str:
    """32 hex digits of the contents of images, in their order; paths do not count.

    Args:
        images: as ``find_image`` returns them.
        file_hash: the hash of a file's whole content.

    Raises:
        InputError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for image in images:
        if image.path is None:
            value = hashlib.sha256(image.content or b"").hexdigest()
        else:
            try:
                value = file_hash(Path(image.path))
            except OSError as error:
                raise InputError(f"{image.path}: cannot be read: {error.strerror}") from None
        digest.update(f"{value}\n".encode())
    return digest.hexdigest()[:32]


def images_hash(
    folder: Path, file_hash: Callable[[Path], str] = checksum, *, only_images: bool = False
) -> str:
    """A hash of the names and contents of all files below a folder of images.

    Args:
        folder: the folder; hidden files and folders do not count.
        file_hash: the hash of a file's whole content. A ``HashCache`` keeps the folder's too.
        only_images: leaves out files whose names end as no image's.

    Raises:
        InputError: a file cannot be read.
    """
    names = list_files(folder)
    if only_images:
        names = [name for name in names if name.lower().endswith(_SUFFIXES)]
    hash_folder = file_hash.folder if isinstance(file_hash, HashCache) else folder_checksum
    try:
        return hash_folder(folder, names)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _locate(path: str, where: str, folder: Path) -> Path:
    file = folder / path
    rule = "must be an image file below the entry's media, or next to the rows without that key"
    try:
        if file.is_file():
            return file
        state = "is a folder" if file.is_dir() else "is not there"
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            rule = "must be a path, or a data URL where it is base64 (data:image/png;base64,...)"
            raise InputError(f"{where}: {rule}, got {show(path)}") from None
        state = f"cannot be read: {error.strerror}"
    raise InputError(f"{where}: {rule}, but {file} {state}")


def _checked(path: str | None, content: bytes | None, name: str) -> ImageFile:
    from PIL import Image as pillow

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # refused below
            opened = pillow.open(_source(path, content))
        with opened as image:
            _refuse_too_large(image.size, name, pillow.MAX_IMAGE_PIXELS)
            _refuse_deep(image.mode, name)
            size = _shown_size(image)
            if not _ends_well(image.format, path, content):
                image.load()
    except InputError:
        raise
    except Exception as error:  # each format's reader raises its own kinds
        raise InputError(
            f"{name}: is no whole image that Pillow reads: {one_line(error)}"
        ) from None
    num_bytes = len(content or b"") if path is None else _num_bytes(path)
    return ImageFile(path, content, num_bytes, size)


def _refuse_too_large(size: tuple[int, int], name: str, limit: int | None) -> None:
    if limit is not None and size[0] * size[1] > limit:
        raise InputError(f"{name}: must have at most {limit} pixels, got {_shape(size)}")


def _refuse_deep(mode: str, name: str) -> None:
    if mode.startswith(_DEEP_MODES):
        rule = "must have 8 bits per channel, as a model would see all values above 255 as white"
        raise InputError(f"{name}: {rule}, got Pillow's mode {mode}")


def _in_rgb(image: Pixels) -> Pixels:
    """The image in RGB. What is transparent shows white, as in transformers' image processors."""
    from PIL import Image as pillow

    if not image.has_transparency_data:
        return image.convert("RGB")
    white = pillow.new("RGBA", image.size, "white")
    return pillow.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _shown_size(image: Pixels) -> tuple[int, int]:
    width, height = image.size
    is_turned = image.getexif().get(_ORIENTATION) in _TURNED
    if is_turned and image.format != "TIFF":  # Pillow has exchanged those of a TIFF already
        return height, width
    return width, height


def _ends_well(kind: str | None, path: str | None, content: bytes | None) -> bool:
    """Whether an encoded image ends as its format demands; False if only decoding can tell."""
    with _opened(path, content) as file:
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(max(0, num_bytes - _TAIL_BYTES))
        tail = file.read()
        file.seek(0)
        head = file.read(12)
    if kind == "JPEG":
        return tail.endswith(b"\xff\xd9")
    if kind == "PNG":
        return tail[-8:-4] == b"IEND"
    if kind == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= num_bytes
    return False


def _opened(path: str | None, content: bytes | None) -> IO[bytes]:
    return io.BytesIO(content or b"") if path is None else open(path, "rb")


def _source(path: str | None, content: bytes | None) -> Any:
    return io.BytesIO(content or b"") if path is None else path


def _num_bytes(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _shape(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
