"""One image as it is stored: resized and written as JPEG, or its own file where that is small already."""

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from ..data.decode import FORMATS, Decoder, find_turn, unreadable_as_oserror
from ..views.scaled import SCALES, Encoded

FILTER = Image.Resampling.LANCZOS  # docs/data.md has the differences that filters and qualities make
GAP = 2  # the decoder may make an image smaller, as long as its sides stay so many times what is stored
SUBSAMPLING = 0  # colours at full resolution: more signal for its bytes than a higher quality with half of it


class Stored(NamedTuple):
    """An image of a prepared dataset.

    Args:
        content: its file.
        before: bytes of the source's file.
        resized: whether it was written anew.
    """

    content: bytes
    before: int
    resized: bool


@dataclass(frozen=True)
class Resizer:
    """Resizes images whose short side is longer than `short_side` pixels to that.

    Args:
        decoder: of the source's images.
        short_side: in pixels.
        quality: of JPEG, 1 to 100.
    """

    decoder: Decoder
    short_side: int
    quality: int

    def __call__(self, row: dict[str, Any] | None) -> Stored:
        """
        Args:
            row: {"bytes", "path"} of an image.

        Raises:
            OSError: it cannot be read.
        """
        content = self.decoder.content(row)
        file = {"bytes": content, "path": None}
        image = self.decoder.encoded(file, self.decoder.image)
        if min(image.size) > self.short_side:
            return Stored(self._written(self._smaller(image)), len(content), True)
        pixels = self.decoder.image(file)  # decoded, for a damaged file is to be found here and not in a run
        if _is_upright(content):
            return Stored(content, len(content), False)
        return Stored(self._written(pixels), len(content), True)

    def _smaller(self, image: Image.Image | Encoded) -> Image.Image:
        width, height = image.size
        factor = self.short_side / min(width, height)
        size = round(factor * width), round(factor * height)
        if isinstance(image, Image.Image):
            return image.resize(size, FILTER)
        scale = next((scale for scale in SCALES if min(width, height) >= GAP * scale * self.short_side), 1)
        if scale == 1:
            return image.whole().resize(size, FILTER)
        scaled = image.scaled(scale)
        x, y = scaled.origin
        return scaled.image.resize(size, FILTER, box=(x, y, x + width / scale, y + height / scale))

    def _written(self, image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=self.quality, subsampling=SUBSAMPLING)
        return file.getvalue()


def _is_upright(content: bytes) -> bool:
    with unreadable_as_oserror(), Image.open(io.BytesIO(content), formats=FORMATS) as header:
        return find_turn(header) is None
