"""Small data sets of numbered images, in every form that `load_images` reads, and a transform that tells them apart."""

import io
import tarfile
from pathlib import Path

import datasets
import torch
from PIL import Image
from torch.utils.data import DataLoader

from training.data.shards import ShardedRows

CLASSES = ["cat", "dog", "fox"]
ROWS = 12


def encoded(i: int, format: str = "PNG") -> bytes:
    """Image number i, which `number` recognises by its colour, also after JPEG."""
    file = io.BytesIO()
    image = Image.new("RGB", (16, 16), (4 * i, 255 - 4 * i, 90))
    image.paste((4 * i, 255 - 4 * i, 190), (12, 12, 16, 16))  # pictures of one colour are refused
    image.save(file, format, quality=100, subsampling=0)
    return file.getvalue()


def number(image: Image.Image) -> int:
    return round(image.getpixel((5, 5))[0] / 4)


def table(numbers, image="image", label="label", broken: dict[int, bytes] | None = None) -> datasets.Dataset:
    """Images of these numbers with class number % 3; `broken` bytes take the place of some."""
    images = [{"bytes": (broken or {}).get(i, encoded(i)), "path": f"photo{i}.jpg"} for i in numbers]
    features = datasets.Features({image: datasets.Image(decode=False), label: datasets.ClassLabel(names=CLASSES)})
    return datasets.Dataset.from_dict({image: images, label: [i % 3 for i in numbers]}, features=features)


def write_parquet(folder: Path, shards: list[range], split: str = "train", **columns) -> Path:
    folder.mkdir(exist_ok=True)
    for i, numbers in enumerate(shards):
        rows = table(numbers, **columns)
        rows = rows.cast_column(rows.column_names[0], datasets.Image())
        # With a batch size, for datasets before 5.2 cannot choose one where there are no rows.
        rows.to_parquet(folder / f"{split}-{i:05d}-of-{len(shards):05d}.parquet", batch_size=1000)
    return folder


def write_folders(folder: Path) -> Path:
    for split, start in (("train", 0), ("test", ROWS)):
        for i in range(start, start + ROWS):
            path = folder / split / CLASSES[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(i))
    return folder


def write_tars(folder: Path) -> Path:
    folder.mkdir()
    for name, numbers in (("train-0", range(6)), ("train-1", range(6, ROWS)), ("test-0", range(ROWS, 2 * ROWS))):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in numbers:
                for suffix, content in (("jpg", encoded(i, "JPEG")), ("cls", str(i % 3).encode())):
                    info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def pixel(image: Image.Image, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A transform that keeps which image it is, and one random number."""
    return {"pixel_values": torch.tensor(number(image)), "random": torch.rand(1, generator=generator)[0]}


def read(images, batch_size: int, workers: int = 0, name: str = "pixel_values", **kwargs) -> list[list]:
    loader = DataLoader(images, batch_size=batch_size, num_workers=workers, **kwargs)
    return [batch[name].tolist() for batch in loader]


def rows_of(shards: list[range], broken: dict[int, bytes] | None):
    for numbers in shards:
        yield from table(numbers, broken=broken)


def stream(shards: list[range], broken: dict[int, bytes] | None = None) -> ShardedRows:
    """A stream of these images; row i is image i where the ranges follow each other."""
    source = datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"shards": shards, "broken": broken})
    return ShardedRows(source, {"image": "image", "label": "label"}, [len(numbers) for numbers in shards])
