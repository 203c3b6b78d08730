"""Views: milliseconds of one core per image and its two views, and images per second of a DataLoader.

The limit is decoding alone, of all pixels; with `--decode scaled` ours decode fewer, and a prepared dataset has fewer. The
baselines are the transforms of the official loader (torchvision on PIL images, which end in normalised float tensors), and
those of lightly if it is installed. Our transforms end in uint8 tensors, which the model normalises on its device.
"""

import argparse
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import islice
from statistics import median
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import transforms as T

from ..data.decode import Decoder
from ..data.images import MapImages, collate
from ..data.memory_images import MemoryImages
from ..data.sources import EvaluationDataArguments, load_images
from ..preparation.prepare import PrepareArguments
from ..preparation.resize import Resizer
from ..views.device import DeviceCrops, DeviceViews
from ..views.opencv import render_view_cv2
from ..views.pil import Views
from ..views.policy import build_policies
from .measure import Benchmark, time_rounds

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL_PX = 32  # side of the small images, which are in memory
OFFICIAL, DECODE_ALONE = "official transforms", "decode alone"
OURS = ("pil", "cv2", "device, the CPU's share")
GRAIN = 3.0  # standard deviation in grey levels, as of a camera; an enlarged photograph without any has too few bytes
QUALITY = 85  # with which 12 megapixels have 1.6 MB


class PILBlur:
    """Gaussian blur of the official loader."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=np.random.uniform(0.1, 2.0)))


class OfficialViews:
    """Two views of a PIL image by torchvision's transforms: of MoCo v2 for photographs, of the notebook for small images."""

    def __init__(self, size: int):
        blur = [T.RandomApply([PILBlur()], p=0.5)] if size > SMALL_PX else []
        self.view = T.Compose(
            [
                T.RandomResizedCrop(size, scale=(0.2, 1.0)),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                *blur,
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, image: Image.Image, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.view(image), "key_pixel_values": self.view(image)}


class LightlyViews:
    """lightly's transform for MoCo v2 (an optional dependency: `pip install lightly`)."""

    def __init__(self, size: int):
        from lightly.transforms import MoCoV2Transform

        self.views = MoCoV2Transform(input_size=size)

    def __call__(self, image: Image.Image, generator: torch.Generator) -> dict[str, torch.Tensor]:
        query, key = self.views(image)
        return {"pixel_values": query, "key_pixel_values": key}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset_name", help="Folder or Hub dataset of photographs. By default random images of 500 x 375 px."
    )
    parser.add_argument(
        "--megapixels", type=float, help="Enlarge the photographs to so many, with grain, as cameras make them."
    )
    parser.add_argument("--images", type=int, default=100, help="Number of photographs per round.")
    parser.add_argument("--image_size", type=int, default=224, help="Side of a view of a photograph in pixels.")
    parser.add_argument("--small_images", type=int, default=512, help="Number of small images per round.")
    parser.add_argument(
        "--loader_images", type=int, default=400, help="Number of photographs per round of a DataLoader."
    )
    parser.add_argument("--rounds", type=int, default=5, help="Number of rounds, each of which runs all variants.")


def run(args: argparse.Namespace) -> list[Benchmark]:
    rows, decoder = photographs(args)
    if args.megapixels:
        pictures = [enlarged(decoder.image(row["image"]), args.megapixels, seed) for seed, row in enumerate(rows)]
        rows, decoder = encoded_rows(pictures), Decoder()
    with one_thread():
        benchmarks = [photograph_views(rows, decoder, args), small_views(args)]
    benchmarks.append(loaders(rows, decoder, args))
    if torch.cuda.is_available():
        benchmarks.append(device_views(args))
    return benchmarks


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photographs(args: argparse.Namespace) -> tuple[datasets.Dataset, Decoder]:
    """Rows with encoded photographs, of the dataset or random, and their decoder."""
    count = max(args.images, args.loader_images)
    if args.dataset_name:
        splits = load_images(EvaluationDataArguments(dataset_name=args.dataset_name))
        return splits.train.select(range(min(count, len(splits.train)))), splits.decoder
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(min(count, 100)):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        grain = random.normal(0, 8, (375, 500, 3))
        image = Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))
        pictures.append(encoded(image, "JPEG"))
    return encoded_rows(pictures), Decoder()


def encoded_rows(pictures: list[dict[str, Any]]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": pictures}, features=features)


def enlarged(image: Image.Image, megapixels: float, seed: int) -> dict[str, Any]:
    """A photograph as one of a camera with so many pixels: enlarged by Lanczos, with grain of brightness, as JPEG."""
    factor = (1e6 * megapixels / (image.width * image.height)) ** 0.5
    size = round(image.width * factor), round(image.height * factor)
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float32)
    grain = np.random.default_rng(seed).standard_normal((*pixels.shape[:2], 1), np.float32)
    noisy = np.clip(pixels + GRAIN * grain + 0.5, 0, 255).astype(np.uint8)
    return encoded(Image.fromarray(noisy), "JPEG", quality=QUALITY)


def encoded(image: Image.Image, format: str, **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


def transforms(size: int, policy: str, decoder: Decoder) -> dict[str, tuple[Any, Callable]]:
    """The transform of each variant, and the decoder of its images."""
    views = Views(build_policies(policy, min_scale=0.2), size)
    found: dict[str, tuple[Any, Callable]] = {
        OFFICIAL: (OfficialViews(size), decoder.image),
        "pil": (views, decoder.image),
        "cv2": (Views(views.policies, size, render_view_cv2), decoder.tensor),
    }
    if size > SMALL_PX:
        found[OURS[2]] = (DeviceCrops(views.policies, size), decoder.tensor)
        for name in OURS:
            transform, decode = found[name]
            found[f"{name}, scaled"] = (transform, partial(decoder.encoded, whole=decode))
        if find_spec("lightly"):
            found["lightly"] = (LightlyViews(size), decoder.image)
    return found


def photograph_transforms(size: int, decoder: Decoder) -> dict[str, tuple[Any, Callable]]:
    """`transforms` of photographs, and their limit, which decodes like the fastest of them."""
    return {DECODE_ALONE: (lambda image, generator: None, decoder.tensor)} | transforms(size, "v2", decoder)


def photograph_views(rows: datasets.Dataset, decoder: Decoder, args: argparse.Namespace) -> Benchmark:
    """Decode photographs in memory and make two views of each, on one core."""
    images = [row["image"] for row in rows.select(range(min(args.images, len(rows))))]
    generator = torch.Generator().manual_seed(0)

    resize = Resizer(decoder, PrepareArguments.short_side, PrepareArguments.quality)
    prepared = [{"bytes": resize(image).content, "path": None} for image in images]

    def make(images: list[dict[str, Any]], transform: Any, decode: Callable) -> None:
        for image in images:
            transform(decode(image), generator)

    found = photograph_transforms(args.image_size, decoder)
    variants: dict[str, Callable] = {name: partial(make, images, *both) for name, both in found.items()}
    variants |= {f"{name}, prepared": partial(make, prepared, *found[name]) for name in OURS}
    title = f"{_described(images, decoder)}, decoded, two v2 views of {args.image_size} px each, one core"
    return _per_image(title, time_rounds(variants, args.rounds), len(images), (DECODE_ALONE, OFFICIAL))


def _described(images: list[dict[str, Any]], decoder: Decoder) -> str:
    megapixels = sum(width * height for width, height in map(decoder.size, images)) / len(images) / 1e6
    return f"{len(images)} photographs of {megapixels:.2g} megapixels"


def small_views(args: argparse.Namespace) -> Benchmark:
    """Make two views of each of some small decoded images in memory, on one core."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (args.small_images, 8, 8, 3), dtype=np.uint8)
    small = [Image.fromarray(x).resize((SMALL_PX, SMALL_PX), Image.Resampling.BICUBIC) for x in pixels]
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in small]
    generator = torch.Generator().manual_seed(0)
    policies = build_policies("cifar", min_scale=0.2)
    source: Any = [{"image": encoded(image, "PNG")} for image in small]
    memory, render, decoder = MemoryImages(source, policies), DeviceViews(policies, SMALL_PX), Decoder()

    def make(transform: Any, images: list) -> None:
        for image in images:
            transform(image, generator)

    def in_batches() -> None:
        render(memory.with_pixels(memory.__getitems__(list(range(len(memory))))))

    variants: dict[str, Callable] = {
        name: partial(make, transform, small if decode == decoder.image else tensors)
        for name, (transform, decode) in transforms(SMALL_PX, "cifar", decoder).items()
    }
    variants["device, in one batch"] = in_batches
    title = f"{len(memory)} images of {SMALL_PX} px from memory, two views each, one core"
    return _per_image(title, time_rounds(variants, args.rounds), len(memory), (OFFICIAL,))


def loaders(rows: datasets.Dataset, decoder: Decoder, args: argparse.Namespace) -> Benchmark:
    """Read the same photographs through a DataLoader with one and with two worker processes."""
    batches = max(1, min(args.loader_images, len(rows)) // 32)
    variants: dict[str, Callable] = {}
    for name, (transform, decode) in transforms(args.image_size, "v2", decoder).items():
        for workers in (1, 2):
            images = MapImages(rows, transform, decode=decode)
            loader = DataLoader(
                images, 32, num_workers=workers, persistent_workers=True, collate_fn=collate, drop_last=len(rows) >= 32
            )
            variants[f"{name}, {workers} workers"] = partial(_read, loader, batches)
    title = f"DataLoader, {32 * batches} photographs, two v2 views of {args.image_size} px each"
    reference = f"{OFFICIAL}, 1 workers"
    return Benchmark(title, time_rounds(variants, args.rounds), (reference,), images=32 * batches)


def _read(loader: DataLoader, batches: int) -> None:
    for _ in islice(loader, batches):
        pass


def device_views(args: argparse.Namespace) -> Benchmark:
    """The GPU's share of the view backend `device`: everything after the crop."""
    policies, size, n = build_policies("v2"), args.image_size, 256
    image = torch.zeros(3, size, size, dtype=torch.uint8)
    crops = DeviceCrops(policies, size)
    rows = [crops(image, torch.Generator().manual_seed(seed)) for seed in range(n)]
    batch = {name: tensor.cuda() for name, tensor in collate(rows).items()}
    views = DeviceViews(policies, size)
    variants: dict[str, Callable] = {
        "eager": partial(views, batch),
        "compiled": partial(torch.compile(views.__call__), batch),
    }
    seconds = time_rounds(variants, args.rounds)
    return _per_image(f"jitter, gray, blur and flip of {n} x 2 crops on {torch.cuda.get_device_name()}", seconds, n, ())


def _per_image(title: str, seconds: dict[str, list[float]], images: int, references: tuple[str, ...]) -> Benchmark:
    each = {name: 1000 * median(times) / images for name, times in seconds.items()}
    return Benchmark(title, seconds, references, images=images, columns={"ms an image": each})
