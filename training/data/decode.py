"""From the bytes of a row to pixels: by PIL, or JPEG files by torchvision.

Images are decoded here and not by `datasets`, so that one broken file costs one file.
"""

import io
import logging
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as tv_decode

logger = logging.getLogger(__name__)


def decode_image(image: dict[str, Any]) -> Image.Image:
    """RGB image of a row, turned upright by its EXIF tag as `datasets` and the pipelines do.

    Raises:
        OSError: the bytes are not an image that PIL can read, or end too early.
    """
    try:
        # `xopen` also reads inside archives, whose paths look like zip://a.png::train.zip.
        source = xopen(image["path"], "rb") if image["bytes"] is None else io.BytesIO(image["bytes"])
        with source, Image.open(source) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (Image.DecompressionBombError, RuntimeError, SyntaxError, ValueError) as error:  # PIL's, for broken files
        raise UnidentifiedImageError(str(error)) from error


def decode_tensor(image: dict[str, Any]) -> torch.Tensor:
    """The same as uint8 (3, H, W), the same pixels: JPEG files by torchvision's decoder, others by PIL.

    Raises:
        OSError: as `decode_image`.
    """
    content = image["bytes"]
    if content is None:
        with xopen(image["path"], "rb") as file:
            content = file.read()
    # An orientation in XMP, which stands among the first bytes, is left to PIL: torchvision knows that of EXIF alone.
    if content.startswith(b"\xff\xd8") and content.find(b"tiff:Orientation", 0, 1 << 16) < 0:
        # torchvision announces that its decoders will move to torchcodec, at every image.
        with suppress(RuntimeError), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels: torch.Tensor = tv_decode(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)
            return pixels
        # Damaged, or of a kind that only PIL reads: PIL decides.
    return torch.from_numpy(np.array(decode_image({"bytes": content, "path": None}))).permute(2, 0, 1)


def log_skipped(row: dict[str, Any], index: int, error: OSError) -> None:
    """Name an image that cannot be read."""
    logger.warning("skipped an image that cannot be read: %s (%s)", row["image"]["path"] or f"row {index}", error)
