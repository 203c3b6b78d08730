"""Images of coloured patches with masks, written in every form that segmentation reads."""

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

CLASSES = ["ground", "red", "green"]
COLOURS = np.array([(90, 90, 90), (220, 40, 40), (40, 200, 60)], np.uint8)
IGNORED = 255


def draw(random, width: int, height: int, border: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) and its mask (H, W): patches of class 1 and 2 on class 0, with a column that does not count."""
    mask = np.zeros((height, width), np.uint8)
    for label in (1, 2, 1):
        h, w = (int(side * random.uniform(0.3, 0.6)) for side in (height, width))
        y, x = int(random.integers(0, height - h)), int(random.integers(0, width - w))
        mask[y : y + h, x : x + w] = label
    image = COLOURS[mask] + random.integers(0, 30, (height, width, 1)).astype(np.uint8)
    if border:
        mask[:, -2:] = IGNORED
    return image, mask


def draw_splits(train: int = 6, test: int = 4, width: int = 72, height: int = 48) -> dict[str, list]:
    """Images and masks of each split, wide and tall in turn."""
    random = np.random.default_rng(0)
    sides = [(width, height), (height, width)]
    return {
        split: [draw(random, *sides[number % 2]) for number in range(count)]
        for split, count in (("train", train), ("test", test))
    }


def as_png(pixels: np.ndarray, palette: bool = False) -> bytes:
    image = Image.fromarray(pixels)
    if palette:
        image = image.convert("P") if image.mode != "L" else image.copy()
        image.putpalette(np.random.default_rng(7).integers(0, 256, 768, dtype=np.uint8).tobytes())
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_folder(folder: Path, splits: dict[str, list] | None = None, palette: bool = False) -> Path:
    for split, pairs in (splits or draw_splits()).items():
        for number, (image, mask) in enumerate(pairs):
            _write(folder / split / "images" / f"{number:02}.png", as_png(image))
            _write(folder / split / "masks" / f"{number:02}.png", as_png(mask, palette))
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    return folder


def write_voc(folder: Path, splits: dict[str, list] | None = None, masks: str = "SegmentationClass") -> Path:
    """Splits 2012_train and 2012_test, whose images are stored without loss under the names of JPEG files."""
    year = folder / "VOC2012"
    (year / "SegmentationClass").mkdir(parents=True, exist_ok=True)
    for split, pairs in (splits or draw_splits()).items():
        names = [f"2012_{split}{number:02}" for number in range(len(pairs))]
        for name, (image, mask) in zip(names, pairs, strict=True):
            _write(year / "JPEGImages" / f"{name}.jpg", as_png(image))
            _write(year / masks / f"{name}.png", as_png(mask, palette=True))
        _write(year / "ImageSets" / "Segmentation" / f"{split}.txt", "\n".join(names).encode())
    return folder


def write_cityscapes(folder: Path, splits: dict[str, list] | None = None) -> Path:
    """Classes 0, 1 and 2 as ids 7, 26 and 24, which are road, car and person; what does not count as id 3."""
    ids = np.full(256, 3, np.uint8)
    ids[:3] = (7, 26, 24)
    for split, pairs in (splits or draw_splits()).items():
        for number, (image, mask) in enumerate(pairs):
            name = f"{split}/town/town_{number:06}_000019"
            _write(folder / "leftImg8bit" / f"{name}_leftImg8bit.png", as_png(image))
            _write(folder / "gtFine" / f"{name}_gtFine_labelIds.png", as_png(ids[mask]))
            _write(folder / "gtFine" / f"{name}_gtFine_color.png", as_png(image))
    return folder


def write_saved(folder: Path) -> Path:
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    splits = datasets.DatasetDict()
    for split, pairs in draw_splits().items():
        columns = {name: [Image.fromarray(pair[i]) for pair in pairs] for i, name in enumerate(features)}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    splits.save_to_disk(folder)
    return folder


def write_parquet(folder: Path, mask_column: str = "annotation", image_column: str = "image") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in draw_splits().items():
        columns = {
            mask_column: [{"bytes": as_png(mask), "path": None} for _, mask in pairs],
            image_column: [{"bytes": as_png(image), "path": None} for image, _ in pairs],
        }
        features = datasets.Features(dict.fromkeys(columns, datasets.Image(decode=False)))
        rows = datasets.Dataset.from_dict(columns, features=features)
        for column in columns:
            rows = rows.cast_column(column, datasets.Image())
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder
