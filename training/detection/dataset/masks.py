"""Masks in COCO's two forms: run lengths (RLE) and polygons.

An RLE is {"size": [height, width], "counts"}: the lengths of runs of pixels down the columns, in turn outside and inside the
object, as a list or in COCO's text. Polygons are lists [x0, y0, x1, y1, ...] in pixels. Run lengths are read here, because a
stranger may have written them; the official rasteriser, which faster-coco-eval has, turns polygons into pixels.
"""

from typing import Any

import numpy as np
from PIL import Image

from ...errors import shown

INSTALL = "pip install faster-coco-eval, or the extra 'detect'"


def coco_library() -> Any:
    """The module faster_coco_eval.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import faster_coco_eval
    except ModuleNotFoundError as error:
        raise ValueError(
            f"faster-coco-eval is not installed, which COCO's metric and polygons need: {INSTALL}"
        ) from error
    return faster_coco_eval


def check_segmentation(mask: Any, width: int, height: int) -> Any:
    """A mask of a dataset in the form that is kept: an RLE with a list of counts, or a list of polygons.

    Args:
        mask: an RLE or polygons.
        width, height: of the image.

    Raises:
        ValueError: it is neither, or an RLE of another size; the message begins with what is wrong.
    """
    if isinstance(mask, dict) and isinstance(mask.get("size"), list | tuple):
        return _check_rle(mask, width, height)
    if isinstance(mask, list) and mask:
        return [_check_polygon(polygon) for polygon in mask]
    raise ValueError(f"a mask ({shown(mask)}) is neither an RLE with size and counts nor a list of polygons")


def _check_rle(mask: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    size, counts = mask["size"], mask.get("counts")
    if list(size) != [height, width]:
        raise ValueError(
            f"a mask has the size {shown(list(size))} of (height, width) and its image [{height}, {width}]"
        )
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", errors="replace")
    runs = _read_counts(counts) if isinstance(counts, str) else counts
    if (
        not isinstance(runs, list)
        or not all(isinstance(run, int) and run >= 0 for run in runs)
        or sum(runs) != width * height
    ):
        raise ValueError(
            f"a mask ({shown(mask['counts'])}) has run lengths that do not fill its {width} x {height} pixels"
        )
    return {"size": [height, width], "counts": runs}


def _read_counts(text: str) -> list[int]:
    """Run lengths from COCO's text: digits of five bits, least first, from sign "0" on; the sixth bit says that more follow.

    From the fourth number on, each is a difference to the one before the last.
    """
    counts: list[int] = []
    value = shift = 0
    for sign in text:
        digit = ord(sign) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32 and shift < 40:  # no run is as long
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts


def _check_polygon(polygon: Any) -> list[float]:
    try:
        points = np.asarray(polygon, np.float64)
    except (TypeError, ValueError):
        points = np.zeros(0)
    if (
        points.ndim != 1
        or len(points) < 6
        or len(points) % 2
        or not np.isfinite(points).all()
        or abs(points).max() > 1e6
    ):
        raise ValueError(f"a polygon ({shown(polygon)}) is no list of at least three points x, y in pixels")
    found: list[float] = points.tolist()
    return found


def area(mask: Any) -> float:
    """Square pixels of a checked mask: those of an RLE, or those inside the lines of polygons, as detectron2 counts them."""
    if isinstance(mask, dict):
        return float(sum(mask["counts"][1::2]))
    total = 0.0
    for polygon in mask:
        x, y = np.asarray(polygon).reshape(-1, 2).T
        total += abs(float(x[:-1] @ y[1:] - y[:-1] @ x[1:] + x[-1] * y[0] - y[-1] * x[0])) / 2
    return total


def rasterize(mask: Any, width: int, height: int) -> np.ndarray:
    """The pixels (height, width) of a checked mask, bool.

    Args:
        width, height: of the view. Polygons are drawn in it, with the image's points scaled; an RLE is resized, by the nearest
            pixel as PIL finds it. detectron2 does both in the same way.
    """
    if not isinstance(mask, dict):
        return draw_polygons(mask, width, height)
    rows, columns = mask["size"]
    inside = np.arange(len(mask["counts"])) % 2 == 1
    pixels = np.repeat(inside, mask["counts"]).reshape(columns, rows).T
    if (columns, rows) == (width, height):
        return pixels
    return np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)) > 0


def draw_polygons(polygons: list[list[float]], width: int, height: int) -> np.ndarray:
    """The pixels (height, width) inside any of these polygons, by COCO's rasteriser.

    Raises:
        ValueError: faster-coco-eval is not installed.
    """
    library = coco_library().mask
    return np.asarray(library.decode(library.merge(library.frPyObjects(polygons, height, width)))).astype(bool)


def encode(masks: np.ndarray) -> list[dict[str, Any]]:
    """Masks (n, height, width) as RLEs with COCO's text.

    Raises:
        ValueError: faster-coco-eval is not installed.
    """
    library = coco_library().mask
    found = library.encode(np.asfortranarray(np.moveaxis(masks, 0, 2), np.uint8)) if len(masks) else []
    return [{"size": list(one["size"]), "counts": _as_text(one["counts"])} for one in found]


def _as_text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
