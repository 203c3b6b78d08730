"""Decode the image of a row: with PIL, or JPEG files with torchvision.

This module decodes, and not `datasets`, so that one broken file costs one image and not the run.
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
    """The RGB image of a row, rotated by its EXIF tag as `datasets` and transformers' pipelines do.

    Args:
        image: {"bytes", "path"}; the path is read where the bytes are None.

    Raises:
        OSError: the file cannot be opened, or PIL cannot decode it.
    """
    try:
        # `xopen` also reads inside archives, whose paths look like zip://a.png::train.zip.
        source = xopen(image["path"], "rb") if image["bytes"] is None else io.BytesIO(image["bytes"])
        with source, Image.open(source) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (
        Image.DecompressionBombError,
        RuntimeError,
        SyntaxError,
        ValueError,
    ) as error:  # PIL raises these for broken files
        raise UnidentifiedImageError(str(error)) from error


def decode_tensor(image: dict[str, Any]) -> torch.Tensor:
    """The same pixels as `decode_image`, uint8 (3, H, W). torchvision decodes JPEG files, PIL decodes the others.

    Raises:
        OSError: as `decode_image`.
    """
    content = image["bytes"]
    if content is None:
        with xopen(image["path"], "rb") as file:
            content = file.read()
    # PIL decodes a file with an orientation in XMP (near its start): torchvision reads the orientation of EXIF alone.
    if content.startswith(b"\xff\xd8") and content.find(b"tiff:Orientation", 0, 1 << 16) < 0:
        # torchvision warns at every image that its decoders will move to torchcodec.
        with suppress(RuntimeError), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            pixels: torch.Tensor = tv_decode(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)
            return pixels
        # torchvision failed: the file is damaged, or only PIL reads its kind. PIL decides which.
    return torch.from_numpy(np.array(decode_image({"bytes": content, "path": None}))).permute(2, 0, 1)


def log_skipped(row: dict[str, Any], index: int, error: OSError) -> None:
    """Log the path, or else the row, of an image that cannot be read."""
    logger.warning("skipped an image that cannot be read: %s (%s)", row["image"]["path"] or f"row {index}", error)
