"""Decode the image of a row: with PIL, or JPEG files with torchvision. One rule for every kind of pixel.

This module decodes, and not `datasets`, so that one broken file costs one image and not the run.
"""

import io
import logging
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as tv_decode

from modeling_moco.image_processing_moco import to_rgb

from ..errors import DataError, first_line, one_line
from ..views.scaled import Encoded, Scaled

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
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # 179 million, PIL's own limit
MAX_RATIO = 1000  # long side by short side: resizing the short side of a line of pixels would take gigabytes
WHITE = 255
MASK_MODES = ("L", "P", "1")
INEXACT = ("AVIF", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "WEBP")  # whose writers may change the numbers of pixels
MAX_BYTES = 2**30  # of the file of one image: what MAX_PIXELS take without compression, and more


@dataclass(frozen=True)
class Decoder:
    """From the image of a row, {"bytes", "path"} or None, to RGB pixels, turned upright by its EXIF tag.

    A stranger may have made the rows. Sizes are looked at before memory is taken, and a row without bytes is read from its path
    only where that lies in the dataset's own place.

    Args:
        max_pixels: of an image; larger ones are not decoded.
        places: beginnings of the paths that may be read; none for rows that have their bytes.
    """

    max_pixels: int = MAX_PIXELS
    places: tuple[str, ...] = ()

    def image(self, row: dict[str, Any] | None) -> Image.Image:
        """The image of a row, upright as `datasets` and transformers' pipelines turn it.

        Raises:
            OSError: there is no image, its file may not be read or cannot be opened, it is too large for `max_pixels` or for
                the memory, or its pixels have no grey levels of known range.
            DataError: the Hub does not give its file.
        """
        with unreadable_as_oserror(), self._file(row) as file:
            return self._from_pil(file)

    def size(self, row: dict[str, Any] | None) -> tuple[int, int]:
        """Width and height in pixels that `image` would have, from the header alone.

        Raises:
            OSError: as `image`.
        """
        with unreadable_as_oserror(), self._file(row) as file, self._opened(file) as header:
            return _upright_size(header)

    def tensor(self, row: dict[str, Any] | None) -> torch.Tensor:
        """The same pixels, uint8 (3, H, W). torchvision decodes JPEG files, PIL decodes the others.

        Raises:
            OSError: as `image`.
        """
        with unreadable_as_oserror(), self._file(row) as file:
            if file.read(2) == b"\xff\xd8":
                with self._opened(file) as header:
                    turn = find_turn(header)
                # torchvision warns at every image that its decoders will move to torchcodec.
                with suppress(RuntimeError), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                    file.seek(0)
                    data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
                    pixels: torch.Tensor = tv_decode(data, mode=ImageReadMode.RGB, apply_exif_orientation=False)
                    return pixels if turn is None else pixels.permute(turn[1]).flip(turn[2])
                # torchvision failed: the file is damaged, or only PIL reads its kind. PIL decides which.
            return torch.from_numpy(np.array(self._from_pil(file))).permute(2, 0, 1)

    def mask(self, row: dict[str, Any] | None) -> np.ndarray:
        """The class numbers that the image of a row has for pixels, uint8 (H, W): places in its palette, or its grey levels.

        Raises:
            OSError: as `image`; or its pixels are no numbers of at most 8 bits, or were stored with loss.
        """
        with unreadable_as_oserror(), self._file(row) as file, self._opened(file) as opened:
            for name in (opened.format, opened.info.get("compression")):  # of a TIFF file
                if str(name).upper() in INEXACT:
                    raise UnidentifiedImageError(
                        f"{str(name).upper()} changes the numbers of pixels: write masks as PNG"
                    )
            if opened.mode not in MASK_MODES:
                raise UnidentifiedImageError(
                    f"a mask has one number of 8 bits for each pixel, grey or in a palette, and this has {opened.mode}"
                )
            step = _grey_step(opened)
            opened.load()
            turn = find_turn(opened)
            return np.array(opened if turn is None else opened.transpose(turn[0])).astype(np.uint8) // np.uint8(step)

    def content(self, row: dict[str, Any] | None) -> bytes:
        """The file of the image of a row.

        Raises:
            OSError: there is none, or it may not be read.
        """
        with unreadable_as_oserror(), self._file(row) as file:
            return file.read()

    def encoded(self, row: dict[str, Any] | None, whole: Callable[[Any], Any]) -> Any:
        """The header of a JPEG file, whose pixels are decoded when it is known how many are needed; other files decoded.

        Args:
            whole: `image` or `tensor`.

        Raises:
            OSError: as `image`; where only the pixels are damaged, when they are decoded.
        """
        read = {"bytes": self.content(row), "path": None}  # so that the file is not opened again
        with unreadable_as_oserror(), self._file(read) as file, self._opened(file) as header:
            is_jpeg, size = header.format in ("JPEG", "MPO"), _upright_size(header)
        return Encoded(size, partial(whole, read), partial(self._scaled, read)) if is_jpeg else whole(read)

    def _scaled(self, row: dict[str, Any], scale: int) -> Scaled:
        with unreadable_as_oserror(), self._file(row) as file, self._opened(file) as opened:
            (width, height), upright, turn = opened.size, _upright_size(opened), find_turn(opened)
            opened.draft(None, (width // scale, height // scale))
            opened.load()
            rgb = opened if opened.mode == "RGB" else to_rgb(opened)  # without a copy
        if turn is None:
            return Scaled(rgb, scale)
        # The last column and row have less than a whole pixel each. A turn may bring them to the beginning.
        x, y = (-side % scale / scale if axis in turn[2] else 0.0 for side, axis in zip(upright, (2, 1), strict=True))
        return Scaled(rgb.transpose(turn[0]), scale, (x, y))

    def _file(self, row: dict[str, Any] | None) -> IO[bytes]:
        if row is None or (row["bytes"] is None and row["path"] is None):
            raise UnidentifiedImageError("the row has no image")
        if row["bytes"] is not None:
            return io.BytesIO(row["bytes"])
        path, remote = row["path"], "://" in row["path"]
        place = path.split("::")[-1] if remote else path  # zip://a.png::train.zip lies where its archive does
        if ".." in path.split("/") or not place.startswith(self.places):
            raise UnidentifiedImageError(
                "the row has a path and no bytes, and only a folder of images has paths that are read"
            )
        if remote:
            try:
                with xopen(path, "rb") as file:
                    return io.BytesIO(file.read(MAX_BYTES))
            except OSError as error:  # of the Hub: the image is not known to be broken
                raise DataError(f"{path} cannot be read ({first_line(error)})") from error
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:  # a device or a pipe may have no end
            raise UnidentifiedImageError(f"{path} is no file of at most {MAX_BYTES:,} bytes")
        return open(path, "rb")

    def _from_pil(self, file: IO[bytes]) -> Image.Image:
        with self._opened(file) as opened:
            rgb = to_rgb(opened)
            turn = find_turn(opened)
            return rgb if turn is None else rgb.transpose(turn[0])

    @contextmanager
    def _opened(self, file: IO[bytes]) -> Iterator[Image.Image]:
        """The header of an image whose size is allowed."""
        file.seek(0)
        if Image.MAX_IMAGE_PIXELS and self.max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = self.max_pixels  # PIL warns above it, and refuses twice of it
        try:
            header = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:  # PIL names an object in memory
            raise UnidentifiedImageError("damaged, or no image of a format that is read") from error
        with header as opened:
            width, height = opened.size
            if width * height > self.max_pixels or max(width, height) > MAX_RATIO * min(width, height):
                raise UnidentifiedImageError(
                    f"{width} x {height} pixels: at most {self.max_pixels:,} are read (--max_image_pixels), and sides at most "
                    f"{MAX_RATIO:,} times as long as wide"
                )
            yield opened


def _grey_step(image: Any) -> int:
    """By how much PIL makes two neighbouring numbers of a grey image differ, whose header is read: 2 and 4 bits become 8."""
    for tile in image.tile:
        rawmode, *more = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if tile.codec_name.startswith("ppm") and image.mode == "L" and more != [WHITE]:
            raise UnidentifiedImageError(f"its grey levels end at {more[-1]}, and PIL scales them: write masks as PNG")
        if bits := re.match(r"L;([24])", str(rawmode)):
            return WHITE // (2 ** int(bits[1]) - 1)
    return 1


# Of rows that have their bytes.
decode_image, decode_tensor = Decoder().image, Decoder().tensor


def find_turn(image: Image.Image) -> tuple[Image.Transpose, tuple[int, ...], tuple[int, ...]] | None:
    """How an image is to be turned upright; None where it is. PIL reads the orientation, for both decoders.

    PIL turns a TIFF file when it loads its pixels. They are upright afterwards, and only the header says how they were stored.
    """
    return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image that is not loaded, turned upright."""
    turn, (width, height) = find_turn(image), image.size
    if isinstance(image, TiffImageFile):  # of which PIL has swapped the sides by its tag, but not by XMP
        width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    return (height, width) if turn is not None and turn[1] != (0, 1, 2) else (width, height)


@contextmanager
def unreadable_as_oserror() -> Iterator[None]:
    """Turn what decoders raise for broken images, and for those that do not fit into memory, to an OSError."""
    try:
        yield
    except (Image.DecompressionBombError, MemoryError, RuntimeError, SyntaxError, TypeError, ValueError) as error:
        raise UnidentifiedImageError(first_line(error)) from error


def is_an_image(path: str | os.PathLike) -> bool:
    """Whether the content of a file is an image, whatever its name is."""
    known: list[str] = [name for name in FORMATS if name != "TGA"]  # whose files begin with nothing of their own
    try:
        with unreadable_as_oserror(), Image.open(Path(path), formats=known):
            return True
    except OSError:
        return False


def name_of(row: dict[str, Any], otherwise: str) -> str:
    """The path of a row's image, or else other words."""
    image = row["image"]
    return one_line((image.get("path") if isinstance(image, dict) else None) or otherwise)


def public_path(path: str | None, dataset: str) -> str | None:
    """A path that says where an image is in its dataset, and not where that is.

    Args:
        dataset: its name, or its absolute path.
    """
    if path is None:
        return None
    inside = path.removeprefix(f"{dataset}/")
    return inside.rsplit("/", 1)[-1] if "://" in inside or inside.startswith("/") or ".." in inside else inside


class Unreadable:
    """The images of a split that cannot be read. Each is logged once, whichever view and whichever worker process meets it.

    Args:
        count: images of the split.
        split: its name, which is said of an image without a path; empty for the train split.
    """

    def __init__(self, count: int, split: str = ""):
        self.split = split
        self._met = torch.zeros(count, dtype=torch.bool).share_memory_()  # worker processes mark it

    def add(self, row: dict[str, Any], number: int, error: OSError) -> None:
        """Note that the image of this row cannot be read, and log it if that is new."""
        if not self._met[number]:
            self._met[number] = True
            logger.warning("skipped an image that cannot be read: %s (%s)", self.name(row, number), error)

    def name(self, row: dict[str, Any], number: int) -> str:
        """The path of a row's image, or else its number and split."""
        return name_of(row, f"row {number}{f' of {self.split}' if self.split else ''}")

    @property
    def numbers(self) -> list[int]:
        """Of the rows that were met."""
        met: list[int] = self._met.nonzero()[:, 0].tolist()
        return met
