"""Decode the image of a row: with PIL, or JPEG files with torchvision. One rule for every kind of pixel.

This module decodes, and not `datasets`, so that one broken file costs one image and not the run.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as tv_decode

from modeling_moco.image_processing_moco import to_rgb

try:
    from pillow_heif import register_heif_opener

    register_heif_opener()  # .heic and .heif files are read where this package is installed
except ModuleNotFoundError:
    pass

logger = logging.getLogger(__name__)

# No formats that start another program (EPS), hold vectors, or are no images of their own.
Image.init()
FORMATS: list[str] = [
    name
    for name in ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
    if name in Image.OPEN  # PIL may be built without some
]
EXTENSIONS = {extension for extension, name in Image.registered_extensions().items() if name in {*FORMATS, "MPO"}}
# By the orientation in EXIF or XMP: PIL's turn; the axes of a tensor (3, H, W) in their new order, and which are reversed then.
TURNS: dict[Any, tuple[Image.Transpose, tuple[int, ...], tuple[int, ...]]] = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, (0, 1, 2), (2,)),
    3: (Image.Transpose.ROTATE_180, (0, 1, 2), (1, 2)),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, (0, 1, 2), (1,)),
    5: (Image.Transpose.TRANSPOSE, (0, 2, 1), ()),
    6: (Image.Transpose.ROTATE_270, (0, 2, 1), (2,)),
    7: (Image.Transpose.TRANSVERSE, (0, 2, 1), (1, 2)),
    8: (Image.Transpose.ROTATE_90, (0, 2, 1), (1,)),
}
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # 179 million: more than that PIL refuses
MAX_RATIO = 1000  # long side by short side: resizing the short side of a line of pixels would take gigabytes


def decode_image(image: dict[str, Any] | None) -> Image.Image:
    """The RGB image of a row, rotated by its EXIF tag as `datasets` and transformers' pipelines do.

    Args:
        image: {"bytes", "path"}; the path is read where the bytes are None. None for a row without an image.

    Raises:
        OSError: there is no image, the file cannot be opened, or its pixels have no grey levels of known range.
    """
    if image is None:
        raise UnidentifiedImageError("the row has no image")
    # `xopen` also reads inside archives, whose paths look like zip://a.png::train.zip.
    source = xopen(image["path"], "rb") if image["bytes"] is None else io.BytesIO(image["bytes"])
    with source, broken_as_oserror(), Image.open(source, formats=FORMATS) as opened:
        check_size(*opened.size)
        rgb = to_rgb(opened)
        turn = find_turn(opened)
        return rgb if turn is None else rgb.transpose(turn[0])


def find_turn(image: Image.Image) -> tuple[Image.Transpose, tuple[int, ...], tuple[int, ...]] | None:
    """How an image is to be turned upright; None where it is. PIL reads the orientation, for both decoders."""
    return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))


@contextmanager
def broken_as_oserror() -> Iterator[None]:
    """Turn what PIL raises for broken files to an OSError."""
    try:
        yield
    except (Image.DecompressionBombError, MemoryError, RuntimeError, SyntaxError, ValueError) as error:
        raise UnidentifiedImageError(str(error)) from error


def check_size(width: int, height: int) -> None:
    """
    Raises:
        UnidentifiedImageError: the image has too many pixels, or is too narrow.
    """
    if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * min(width, height):
        raise UnidentifiedImageError(
            f"{width} x {height} pixels: at most {MAX_PIXELS:,} are read, and sides at most {MAX_RATIO:,} times as long as wide"
        )


def decode_tensor(image: dict[str, Any] | None) -> torch.Tensor:
    """The same pixels as `decode_image`, uint8 (3, H, W). torchvision decodes JPEG files, PIL decodes the others.

    Raises:
        OSError: as `decode_image`.
    """
    if image is None:
        raise UnidentifiedImageError("the row has no image")
    content = image["bytes"]
    if content is None:
        with xopen(image["path"], "rb") as file:
            content = file.read()
    if content.startswith(b"\xff\xd8"):
        with broken_as_oserror(), Image.open(io.BytesIO(content), formats=FORMATS) as header:
            check_size(*header.size)
            turn = find_turn(header)
        # torchvision warns at every image that its decoders will move to torchcodec.
        with suppress(RuntimeError), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels: torch.Tensor = tv_decode(data, mode=ImageReadMode.RGB, apply_exif_orientation=False)
            return pixels if turn is None else pixels.permute(turn[1]).flip(turn[2])
        # torchvision failed: the file is damaged, or only PIL reads its kind. PIL decides which.
    return torch.from_numpy(np.array(decode_image({"bytes": content, "path": None}))).permute(2, 0, 1)


def is_an_image(path: str | PathLike) -> bool:
    """Whether the content of a file is an image, whatever its name is."""
    known: list[str] = [name for name in FORMATS if name != "TGA"]  # whose files begin with nothing of their own
    try:
        with broken_as_oserror(), Image.open(Path(path), formats=known):
            return True
    except OSError:
        return False


def name_of(row: dict[str, Any], index: int) -> str:
    """The path of a row's image, or else its number."""
    image = row["image"]
    return (image.get("path") if isinstance(image, dict) else None) or f"row {index}"


def log_skipped(row: dict[str, Any], index: int, error: OSError) -> None:
    """Log the path, or else the row, of an image that cannot be read."""
    logger.warning("skipped an image that cannot be read: %s (%s)", name_of(row, index), error)
