"""Build the training images of a run, and the renderer of their views, for the chosen view backend."""

import operator
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainingArguments

from modeling_moco.image_processing_moco import to_rgb

from ..views.device import DeviceCrops, DeviceViews
from ..views.opencv import render_view_cv2
from ..views.pil import OwnViews, Views, render_view
from ..views.policy import VIEWS, build_policies
from .decode import Decoder
from .images import Decode, MapImages, StreamedImages, TrainingImages
from .memory_images import MemoryImages
from .sources import MAX_IN_MEMORY_PX, DataArguments, ImageSplits

OwnView = Callable[[Image.Image, torch.Generator], torch.Tensor]


def training_images(
    data: DataArguments, splits: ImageSplits, training: TrainingArguments, bank: bool = False
) -> TrainingImages:
    """The training images with their two views.

    Args:
        data: settings of the views.
        splits: of the same settings.
        training: sets seed, batch size and processes.
        bank: whether they are for a memory bank: each with one view, and with "index", the number of its row.

    Raises:
        ValueError: the view backend cannot use the images, or no image can be read.
    """
    transform, rows, decoder = training_views(data, bank), splits.train, splits.decoder
    decode: Decode = decoder.image if data.view_backend == "pil" else decoder.tensor
    if data.decode == "scaled":
        decode = partial(decoder.encoded, whole=decode)
    if not data.streaming:
        if data.view_backend == "device" and _are_small(rows, decoder):
            workers = training.dataloader_num_workers
            return MemoryImages(rows, transform.policies, training.seed, decoder.tensor, bank, splits.broken, workers)
        return MapImages(rows, transform, training.seed, decode, bank, splits.broken)
    return StreamedImages(
        rows,
        transform,
        batch_size=training.per_device_train_batch_size,
        seed=training.seed,
        rank=training.process_index,
        world_size=training.world_size,
        buffer_size=data.shuffle_buffer,
        decode=decode,
        numbered=bank,
        broken=splits.broken,
    )


def training_views(data: DataArguments, bank: bool = False) -> Views | DeviceCrops:
    """The transform of an image to its two views, for a `bank` to one, or to the crops that `build_render` turns into views."""
    both = build_policies(data.augmentation, data.horizontal_flip, data.crop_min_scale)
    policies = both[:1] if bank else both
    if data.view_backend == "device":
        return DeviceCrops(policies, data.image_size)
    return Views(policies, data.image_size, render_view_cv2 if data.view_backend == "cv2" else render_view)


def build_render(data: DataArguments, compiled: bool, bank: bool = False) -> Callable | None:
    """The renderer of a batch of views on the training device; None where the transform already makes the views."""
    if data.view_backend != "device":
        return None
    views = training_views(data, bank)
    render = DeviceViews(views.policies, views.size)
    return torch.compile(render.__call__) if compiled else render


def _are_small(rows: Any, decoder: Decoder) -> bool:
    for row in rows:
        with suppress(OSError):
            return max(decoder.image(row["image"]).size) <= MAX_IN_MEMORY_PX
    return False


class Pictures:
    """Rows of a map-style torch Dataset, whose items are PIL images or tuples that begin with one.

    The "image" of a row is a function that reads it, so that a file that cannot be read costs one image and not the run.
    """

    def __init__(self, dataset: Dataset):
        self.dataset: Any = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": partial(self.read, index)}

    def read(self, index: int) -> Image.Image:
        """
        Raises:
            OSError: the Dataset cannot read its file.
            ValueError: the item is no image.
        """
        item = self.dataset[index]
        image = item[0] if isinstance(item, tuple | list) else item
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"train_dataset has items of {type(image).__name__}: give PIL images, or tuples that begin with one, without a "
                "transform (the trainer makes the views)"
            )
        return to_rgb(image)


def _makes_views(dataset: Any) -> bool:
    map_style = isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset)
    return map_style and isinstance(dataset[0], dict) and VIEWS[1] in dataset[0]


def as_training_images(
    dataset: Any, processor: Any, seed: int, view: OwnView | None = None, bank: bool = False
) -> TrainingImages:
    """Training images of anything that has images: the views of v2, unless it makes its own, or `view` makes them.

    Args:
        dataset: training images of this project, or another map-style Dataset of both views with the methods of
            `TrainingImages` that a run calls; an in-memory `datasets.Dataset` with one image column, or a map-style torch
            Dataset whose items are PIL images or tuples that begin with one.
        processor: the image processor of the model, whose `crop_size` is the size of a view in pixels.
        seed: of the random views.
        view: as of `OwnViews`.
        bank: as of `training_images`.

    Raises:
        ValueError: it is none of these, it has another number of image columns, it makes views and so does `view`, or it
            makes two views and the run has a memory bank.
    """
    ours = isinstance(dataset, MapImages | MemoryImages | StreamedImages)
    if ours or _makes_views(dataset):
        kind = type(dataset).__name__
        if view is not None:
            raise ValueError(f"view is for images alone, and this {kind} makes its own views: leave one of both out")
        numbered = ours and dataset.numbered
        if bank and not numbered:
            raise ValueError(
                f"a memory bank takes one view of an image and the number of its row, which this {kind} does not give: pass "
                "images alone, or images of this project with one policy and numbered=True"
            )
        if numbered and not bank:
            raise ValueError(
                f"this {kind} gives one view of an image and the number of its row, for a memory bank: build it with two "
                "policies and without numbered"
            )
        return dataset
    size = view_size(processor)
    views: Views | OwnViews
    if view is None:
        policies = build_policies("v2")
        views = Views(policies[:1] if bank else policies, size)
    else:
        views = OwnViews(view, count=1 if bank else 2)
    images = _indexed(dataset, views, seed, bank)
    if view is not None and (made := tuple(images[0]["pixel_values"].shape[1:])) != (size, size):
        raise ValueError(
            f"view makes {made[0]} x {made[1]} px, but the image processor is for {size} px: make them equal"
        )
    return images


def view_size(processor: Any) -> int:
    """The side of a view in pixels: that of the square which an image processor cuts out.

    Raises:
        ValueError: it cuts out none.
    """
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", True) else None
    if not crop or crop["height"] != crop["width"]:
        raise ValueError(
            f"processing_class ({type(processor).__name__}) cuts out no square, whose side is the size of a view: pass "
            'MoCoImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})'
        )
    return int(crop["height"])


def _indexed(dataset: Any, views: Views | OwnViews, seed: int, bank: bool) -> MapImages:
    if isinstance(dataset, datasets.Dataset):
        if dataset.format["type"] == "custom":
            raise ValueError(
                "train_dataset has a transform (set_transform), but the trainer makes the views of its images: take it away by "
                "with_format(None), and pass a view of your own as view="
            )
        dataset = dataset.with_format(None)  # which would make other things of its rows, or hide columns
        columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if len(columns) != 1:
            raise ValueError(
                f"train_dataset has {len(columns)} image columns among {', '.join(dataset.column_names)}: keep one, and cast "
                "it to datasets.Image"
            )
        rows = dataset.select_columns(columns)
        if columns != ["image"]:
            rows = rows.rename_column(columns[0], "image")
        own = Decoder(places=("",))  # whoever made it in Python has chosen its paths
        return MapImages(rows.cast_column("image", datasets.Image(decode=False)), views, seed, own.image, bank)
    if not isinstance(dataset, Dataset) or isinstance(dataset, IterableDataset):
        raise ValueError(
            f"train_dataset ({type(dataset).__name__}) is not a map-style dataset: pass a datasets.Dataset or a torch Dataset "
            "of images, and a stream as StreamedImages"
        )
    return MapImages(Pictures(dataset), views, seed, operator.call, bank)
