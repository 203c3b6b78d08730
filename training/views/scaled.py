"""Views of photographs that are decoded no larger than their views need: `--decode scaled`.

A decoder of JPEG can leave out the fine frequencies of each block of 8 x 8 pixels, which makes an image of 1/2, 1/4 or 1/8 of
the sides in a fraction of the time. The parameters of the views are sampled from the size in the header, as of the whole image,
and say which scale is small enough.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

Box = tuple[int, int, int, int]  # top, left, height and width in pixels of the whole image

SCALES = (8, 4, 2)  # by which a decoder of JPEG divides the sides


@dataclass(frozen=True)
class Encoded:
    """A JPEG file of which only the header was read.

    Args:
        size: width and height in pixels, upright.
        whole: decodes all pixels, as the renderer takes them.
        scaled: decodes with the sides divided by one of `SCALES`.
    """

    size: tuple[int, int]
    whole: Callable[[], Any]
    scaled: Callable[[int], "Scaled"]

    def pixels(self, boxes: Sequence[Box], size: int) -> Any:
        """The pixels from which these boxes are to be cropped to `size` pixels: whole, or [`Scaled`].

        Raises:
            OSError: the file is damaged.
        """
        scale = find_scale(boxes, size)
        return self.whole() if scale == 1 else self.scaled(scale)


def pixels_for(image: Any, boxes: Sequence[Box], size: int) -> Any:
    """`Encoded.pixels`, or the image itself where it is decoded already."""
    return image.pixels(boxes, size) if isinstance(image, Encoded) else image


def find_scale(boxes: Sequence[Box], size: int) -> int:
    """The largest of `SCALES` at which no side of a box has fewer than `size` pixels; 1 if there is none."""
    shortest = min(side for _, _, *sides in boxes for side in sides)
    return next((scale for scale in SCALES if shortest >= scale * size), 1)


@dataclass(frozen=True)
class Scaled:
    """An upright image whose sides are those of the whole one divided by `scale`, and rounded up.

    Args:
        image: RGB.
        origin: where the left upper corner of the whole image lies, in pixels of this one: (x, y) in [0, 1). It is not 0 where
            an image that was turned has part of a pixel at its end.
    """

    image: Image.Image
    scale: int
    origin: tuple[float, float] = (0.0, 0.0)

    def crop(self, box: Box, size: int) -> Image.Image:
        """Crop a box of the whole image, whose edges may lie inside pixels of this one, and resize it as `pil` does."""
        top, left, height, width = (side / self.scale for side in box)
        left, top = left + self.origin[0], top + self.origin[1]
        x, y = math.floor(left), math.floor(top)
        # Cut out first, so that the filter does not see what lies outside, as it does not in the whole image.
        cut = self.image.crop((x, y, math.ceil(left + width), math.ceil(top + height)))
        edges = (left - x, top - y, left - x + width, top - y + height)
        return cut.resize((size, size), Image.Resampling.BILINEAR, box=edges)
