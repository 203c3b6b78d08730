"""The ImageNet evaluation transform, and those of detectors and of segmentation models. Sizes are pixels.

The first resizes the short side, cuts the centre and normalises, equal to torchvision's `Resize(256)`, `CenterCrop(224)`,
`ToTensor`, `Normalize`. The second resizes, normalises and pads, equal to detectron2's. The third normalises images of any
size.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .configuration_moco import is_of_wrapper

MAX_SAMPLE_VALUE = 281  # TIFF 6.0, section 8
SEGMENTATION_STRIDE = 16  # pixels from one place of a segmentation model's map to the next
SMALLEST_SIDE = 1e-5  # of a box after resizing: smaller ones are dropped
MOST_PIXELS = 1e6  # from the corner of an image to a point of a polygon: the rasteriser walks along the lines


def to_rgb(image: Image.Image) -> Image.Image:
    """The image with 8 bits of red, green and blue, the same in training, evaluation and the image processors.

    Grey levels of 16 bits are scaled to 8 (PIL would clip them), by their own number of bits where a TIFF file states it.
    Transparency is dropped, as transformers' pipelines and timm do before any processor sees the image.

    Raises:
        ValueError: the pixels have 32 bits, whose range nobody knows, or PIL cannot convert them.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PIL scales PPM to 16 bits
        white = _white(image)
        levels = np.minimum(np.asarray(image).astype(np.uint32), white)
        return Image.fromarray(((levels * 255 + white // 2) // white).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("grey levels of 32 bits have no known range: write the images with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # or PIL warns that it drops the transparency
    return image.convert("RGB")


def _white(image: Image.Image) -> int:
    """The largest grey level that a 16-bit image can have."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        return int(image.tag_v2.get(MAX_SAMPLE_VALUE, (2**bits - 1,))[0])
    return 2**16 - 1


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalise uint8 images (N, 3, H, W): scale to [0, 1], subtract the mean, divide by the standard deviation.

    Args:
        mean, std: one number per channel.

    Returns:
        float32 images (N, 3, H, W) in channels_last layout.
    """
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.div_(255).sub_(_per_channel(mean, images.device)).div_(_per_channel(std, images.device))


def _per_channel(values: Sequence[float], device: torch.device) -> torch.Tensor:
    # Filled on the device: a copy from the host's memory could wait for all that a GPU has been given before.
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])


class _Pixels:
    resample = PILImageResampling.BILINEAR
    default_to_square = False
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def process_image(self, image, do_convert_rgb=None, *args, **kwargs):
        # transformers would clip 16 bits and put white behind what is transparent.
        if do_convert_rgb and isinstance(image, Image.Image):
            image = to_rgb(image)
        return super().process_image(image, do_convert_rgb, *args, **kwargs)  # type: ignore[misc]  # the backend's


def _settings_of_wrapper(source: Any, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    # A published model that was saved without this code has no file of an image processor: timm's settings say the same.
    try:
        config, rest = PreTrainedConfig.get_config_dict(source, **given)
    except OSError:
        return None
    if not is_of_wrapper(config):
        return None
    told = config["pretrained_cfg"]
    height, width = told["input_size"][1:]
    return {
        "size": {"shortest_edge": math.floor(height / told["crop_pct"])},  # as timm does
        "crop_size": {"height": height, "width": width},
        "image_mean": told["mean"],
        "image_std": told["std"],
    }, rest


class _EvaluationTransform(_Pixels):
    size = {"shortest_edge": 256}
    crop_size = {"height": 224, "width": 224}
    do_center_crop = True

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        try:
            return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]  # the backend's
        except OSError:
            settings = _settings_of_wrapper(pretrained_model_name_or_path, kwargs)
            if settings is None:
                raise
            return settings

    def center_crop(self, image, size, **kwargs):
        # transformers truncates an odd margin, torchvision rounds it: a fifth of all images would be shifted by one pixel.
        height, width = image.shape[-2:]
        if height < size.height or width < size.width:
            return super().center_crop(image, size, **kwargs)  # type: ignore[misc]  # the backend's method, which pads
        top, left = round((height - size.height) / 2), round((width - size.width) / 2)
        return image[..., top : top + size.height, left : left + size.width]


class MoCoImageProcessor(_EvaluationTransform, TorchvisionBackend):
    """Evaluation transform on torchvision tensors: fast, and within one grey level of the PIL backend."""


class MoCoImageProcessorPil(_EvaluationTransform, PilBackend):
    """Evaluation transform on PIL: equal to the papers' transform."""


class MoCoSegmentationImageProcessor(_Pixels, PilBackend):
    """Images for [`MoCoForSemanticSegmentation`] at their own size, and its outputs as classes of their pixels.

    Images of different sizes make no batch: pass them one by one, as `pipeline("image-segmentation")` does.
    """

    do_resize = False

    def post_process_semantic_segmentation(self, outputs: Any, target_sizes: Any = None) -> list[torch.Tensor]:
        """The class of each pixel of each image (height, width), int64.

        Args:
            outputs: those of [`MoCoForSemanticSegmentation`].
            target_sizes: height and width of each image (N, 2), which its map is to have; by default that is the size of the
                logits, a sixteenth of the image's.

        Raises:
            ValueError: not as many sizes as images, or not those that the model saw.
        """
        logits = outputs["logits"]
        if target_sizes is None:
            return [*logits.argmax(dim=1)]
        if len(target_sizes) != len(logits):
            raise ValueError(
                f"target_sizes (of {len(target_sizes)} images) must be of all {len(logits)} images: pass one for each"
            )
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        of_map = tuple(logits.shape[2:])
        for height, width in sizes:
            if (math.ceil(height / SEGMENTATION_STRIDE), math.ceil(width / SEGMENTATION_STRIDE)) != of_map:
                raise ValueError(
                    f"target_sizes ({height}, {width}) must be of the image that the model saw, whose logits are {of_map}: "
                    "resize the map of classes afterwards, by the nearest pixel"
                )
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        return [enlarge(one[None], size)[0].argmax(dim=0) for one, size in zip(logits, sizes, strict=True)]


def enlarge(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits (N, L, h, w) at the size of their image, bilinear in float32: (N, L, height, width).

    The convolutions of a ResNet put place j of a map on pixel 16 j, which neither setting of `align_corners` keeps at every
    size. At 513 and 769 pixels, the sizes of the paper, this is `align_corners=True`. Pixels beyond the last place have its
    scores.
    """
    height, width = ((side - 1) * SEGMENTATION_STRIDE + 1 for side in logits.shape[2:])
    enlarged = F.interpolate(logits.float(), size=(height, width), mode="bilinear", align_corners=True)
    return F.pad(enlarged, (0, size[1] - width, 0, size[0] - height), mode="replicate")


def resized_size(height: int, width: int, shortest_edge: int, longest_edge: int) -> tuple[int, int]:
    """Height and width with a short side of `shortest_edge`, or less where the long one would exceed `longest_edge`.

    Sides are rounded as detectron2's `ResizeShortestEdge` rounds them; transformers rounds them down.
    """
    scale = shortest_edge / min(height, width)
    sides = [shortest_edge, scale * width] if height < width else [scale * height, shortest_edge]
    if max(sides) > longest_edge:
        shrink = longest_edge / max(sides)
        sides = [side * shrink for side in sides]
    return max(int(sides[0] + 0.5), 1), max(int(sides[1] + 0.5), 1)


class DetectionKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # mypy does not see transformers
    """
    return_segmentation_masks (`bool`, *optional*, defaults to `False`):
        Whether labels have masks too.
    """

    return_segmentation_masks: bool


class MoCoDetectionImageProcessor(_Pixels, PilBackend):
    """Images and annotations for [`MoCoForObjectDetection`], and its outputs in pixels.

    Images are resized by PIL with detectron2's rounding, normalised, and padded with zeros to the largest of the batch.
    `pixel_mask` is 1 where there is an image.
    """

    valid_kwargs = DetectionKwargs
    model_input_names = ["pixel_values", "pixel_mask"]
    size = {"shortest_edge": 800, "longest_edge": 1333}
    do_pad = True
    return_segmentation_masks = False

    def preprocess(self, images, annotations=None, **kwargs):
        """Prepare images, and with `annotations` labels for training.

        Args:
            annotations: of each image, or of the only one, either COCO's `{"image_id": 7, "annotations": [{"bbox": ...,
                "category_id": ...}, ...]}` or `objects` of a dataset, `{"bbox": [...], "category": [...]}`, alone or as such
                a key of a row. Boxes are `x y width height` in pixels of the given image; classes count from 0. Objects with
                `iscrowd` and boxes outside the image are left out. A `segmentation` is a mask (height, width), a list of
                polygons or an RLE; the last two need faster-coco-eval. With masks, objects without a pixel are left out too.

        Returns:
            `pixel_values` (N, 3, H, W), `pixel_mask` (N, H, W), and `labels` as the model takes them, with `orig_size` and
            `size` (height, width) before and after resizing, and with `image_id` where it was given.

        Raises:
            ValueError: annotations that do not belong to the images, or lack what is needed; or no faster-coco-eval.
        """
        return super().preprocess(images, annotations, **kwargs)

    def _preprocess_image_like_inputs(self, images, annotations=None, *args, **kwargs):
        return_tensors, do_pad = kwargs.pop("return_tensors", None), kwargs.pop("do_pad", None)
        originals = self._prepare_image_like_inputs(images, **kwargs)
        resized = self._preprocess(originals, do_pad=False, return_tensors=None, **kwargs)["pixel_values"]
        data: dict[str, Any] = {"pixel_values": resized}
        if do_pad:
            data["pixel_values"], data["pixel_mask"] = self.pad(resized, kwargs.get("pad_size"), return_mask=True)
        batch = BatchFeature(data, tensor_type=return_tensors)
        if annotations is not None:
            annotations = [annotations] if isinstance(annotations, Mapping) else annotations
            if len(annotations) != len(resized):
                raise ValueError(
                    f"annotations (of {len(annotations)} images) must be of all {len(resized)} images: pass one for each"
                )
            with_masks = bool(kwargs.get("return_segmentation_masks"))
            sizes = [(before.shape[1:], after.shape[1:]) for before, after in zip(originals, resized, strict=True)]
            labels = [_label(*pair, with_masks) for pair in zip(annotations, sizes, strict=True)]
            batch["labels"] = [BatchFeature(label, tensor_type=return_tensors) for label in labels]
        return batch

    def resize(self, image, size, *args, **kwargs):
        if size.shortest_edge and size.longest_edge:
            height, width = resized_size(image.shape[1], image.shape[2], size.shortest_edge, size.longest_edge)
            size = SizeDict(height=height, width=width)
        return super().resize(image, size, *args, **kwargs)

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.5, target_sizes: Any = None
    ) -> list[dict[str, torch.Tensor]]:
        """Detections of each image: `scores`, `labels` and `boxes`, the best first.

        Args:
            outputs: those of [`MoCoForObjectDetection`].
            threshold: detections have a higher score.
            target_sizes: height and width of each image (N, 2), in whose pixels boxes are to be; by default they are shares.

        Raises:
            ValueError: not as many sizes as images.
        """
        n = len(outputs["scores"])
        if target_sizes is not None and len(target_sizes) != n:
            raise ValueError(
                f"target_sizes (of {len(target_sizes)} images) must be of all {n} images: pass one for each"
            )
        found = []
        for i, (scores, labels, boxes) in enumerate(
            zip(outputs["scores"], outputs["labels"], outputs["pred_boxes"], strict=True)
        ):
            kept = (labels >= 0) & (scores > threshold)
            boxes = boxes[kept]
            if target_sizes is not None:
                height, width = (int(side) for side in target_sizes[i])
                boxes = boxes * boxes.new_tensor([width, height, width, height])
            found.append({"scores": scores[kept], "labels": labels[kept], "boxes": boxes})
        return found

    def post_process_instance_segmentation(
        self, outputs: Any, threshold: float = 0.5, target_sizes: Any = None, mask_threshold: float = 0.5
    ) -> list[dict[str, torch.Tensor]]:
        """As `post_process_object_detection`, with `masks` (objects, height, width), booleans, of each image.

        Args:
            target_sizes: height and width of each image (N, 2), which masks are to have.
            mask_threshold: probability that a pixel of a mask has at least.

        Raises:
            ValueError: the model has no masks, or not as many sizes as images.
        """
        if (probabilities := outputs.get("pred_masks")) is None:
            raise ValueError("pred_masks (None) are needed: load the model with masks=True, and train it")
        if target_sizes is None:
            raise ValueError("target_sizes (None) are needed for masks: pass height and width of each image")
        found = self.post_process_object_detection(outputs, threshold, target_sizes)
        for i, of_image in enumerate(found):
            kept = (outputs["labels"][i] >= 0) & (outputs["scores"][i] > threshold)
            height, width = (int(side) for side in target_sizes[i])
            masks = paste_masks(probabilities[i][kept], of_image["boxes"], height, width)
            of_image["masks"] = masks >= mask_threshold
        return found


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Probabilities (B, S, S) in boxes (B, 4) as those of all pixels of the image (B, height, width), float32.

    They are interpolated at the centres of pixels, without rounding the boxes, and 0 outside.
    """
    pasted = masks.new_zeros(len(masks), height, width, dtype=torch.float32)
    for mask, box, target in zip(masks.float(), boxes.tolist(), pasted, strict=True):
        places, ranges = [], []
        for low, high, most in ((box[0], box[2], width), (box[1], box[3], height)):
            # Only around the box: the probabilities are of few pixels, and images have many.
            start, end = max(math.floor(low) - 1, 0), min(math.ceil(high) + 1, most)
            centres = torch.arange(start, max(end, start), device=masks.device, dtype=torch.float32) + 0.5
            places.append((centres - low) / (high - low) * 2 - 1)
            ranges.append(slice(start, max(end, start)))
        y, x = torch.meshgrid(places[1], places[0], indexing="ij")
        grid = torch.stack([x, y], dim=-1)[None]
        target[ranges[1], ranges[0]] = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
    return pasted


def _label(annotation: Any, sizes: tuple[tuple[int, int], tuple[int, int]], with_masks: bool) -> dict[str, Any]:
    """The labels of an image from its annotations, with its sizes before and after resizing."""
    (height, width), resized = sizes
    objects = [one for one in _objects(annotation) if not one.get("iscrowd")]
    boxes = np.array([one["bbox"] for one in objects], dtype=np.float64).reshape(-1, 4)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) / [width, height, width, height]
    corners = corners.clip(0, 1)
    sides = corners[:, 2:] - corners[:, :2]
    kept = np.all(sides * [resized[1], resized[0]] > SMALLEST_SIDE, axis=1)
    label: dict[str, Any] = {
        "class_labels": np.array([one["category_id"] for one in objects], dtype=np.int64)[kept],
        "boxes": np.concatenate([corners[:, :2] + sides / 2, sides], axis=1)[kept].astype(np.float32),
        "orig_size": np.array([height, width], dtype=np.int64),
        "size": np.array(resized, dtype=np.int64),
    }
    if with_masks:
        masks = [_resized_mask(objects[i].get("segmentation"), *sizes) for i in kept.nonzero()[0]]
        seen = np.array([mask.any() for mask in masks], dtype=bool)
        label["masks"] = np.stack(masks)[seen] if masks else np.zeros((0, *resized), dtype=np.uint8)
        label |= {name: label[name][seen] for name in ("class_labels", "boxes")}
    if "image_id" in annotation:
        label["image_id"] = np.array([annotation["image_id"]], dtype=np.int64)
    return label


def _objects(annotation: Any) -> list[dict[str, Any]]:
    """The objects of an image, each with `bbox` and `category_id`.

    Raises:
        ValueError: they are in another form, or lack one of these.
    """
    found = annotation.get("annotations", annotation.get("objects", annotation))
    if isinstance(found, Mapping):
        lengths = {name: len(column) for name, column in found.items() if isinstance(column, list | tuple | np.ndarray)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"annotations ({lengths}) must have lists of one length, one entry for each object")
        found = [dict(zip(lengths, row, strict=True)) for row in zip(*(found[name] for name in lengths), strict=True)]
    objects = []
    for one in found:
        category = next((one[name] for name in ("category_id", "category", "label") if name in one), None)
        if category is None or "bbox" not in one:
            raise ValueError(f"annotations ({', '.join(one)}) must have bbox and category_id: rename the columns")
        if len(one["bbox"]) != 4:
            raise ValueError(f"bbox ({one['bbox']}) must have four numbers: x, y, width, height in pixels")
        objects.append({**one, "category_id": category})
    return objects


def _resized_mask(segmentation: Any, size: tuple[int, int], resized: tuple[int, int]) -> np.ndarray:
    """The pixels of an object after resizing: polygons are drawn there, other masks are resized by the nearest pixel.

    Raises:
        ValueError: it is no mask of the image.
    """
    if isinstance(segmentation, list | tuple) and len(segmentation):
        return _drawn(segmentation, size, resized)
    if isinstance(segmentation, Mapping):
        segmentation = _decoded(segmentation, size)
    mask = np.asarray(segmentation) if isinstance(segmentation, np.ndarray | Image.Image) else None
    if mask is None or mask.shape != tuple(size):
        kind = type(segmentation).__name__ if mask is None else mask.shape
        raise ValueError(
            f"segmentation ({kind}) must be a mask of {size[0]} x {size[1]} pixels, a list of polygons or an RLE: pass one of "
            "these"
        )
    image = Image.fromarray((mask != 0).astype(np.uint8))
    return np.asarray(image.resize((resized[1], resized[0]), Image.Resampling.NEAREST))


def _drawn(polygons: Sequence[Any], size: tuple[int, int], resized: tuple[int, int]) -> np.ndarray:
    scale = np.array([resized[1] / size[1], resized[0] / size[0]])
    scaled = []
    for polygon in polygons:
        try:
            points = np.asarray(polygon, dtype=np.float64)
        except (TypeError, ValueError):
            points = np.zeros(0)
        if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not np.all(np.abs(points) <= MOST_PIXELS):
            raise ValueError(
                f"a polygon ({str(polygon)[:60]}) must be a list x0, y0, x1, y1, ... of at least three points in pixels"
            )
        scaled.append((points.reshape(-1, 2) * scale).ravel().tolist())
    coco = _coco_masks()
    return np.asarray(coco.decode(coco.merge(coco.frPyObjects(scaled, *resized))))


def _decoded(rle: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    counts, shape = rle.get("counts"), np.asarray(rle.get("size")).tolist()
    if not isinstance(counts, str | bytes | list | tuple | np.ndarray) or shape != list(size):
        raise ValueError(
            f"an RLE (size {rle.get('size')}) must have counts, and the size [{size[0]}, {size[1]}] of its image: correct it"
        )
    coco = _coco_masks()
    try:
        if isinstance(counts, str | bytes):
            return np.asarray(coco.decode({"size": list(size), "counts": counts}))
        return np.asarray(coco.decode(coco.frPyObjects({"size": list(size), "counts": list(map(int, counts))}, *size)))
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"an RLE ({str(counts)[:60]}) has run lengths that do not fill its {size[0]} x {size[1]} pixels: correct it"
        ) from error


def _coco_masks() -> Any:
    """COCO's rasteriser. It is imported where it is needed, because most users of the model have no masks."""
    try:
        from faster_coco_eval import mask
    except ModuleNotFoundError as error:
        raise ValueError(
            "faster-coco-eval is not installed, which polygons and RLE need: pip install faster-coco-eval"
        ) from error
    return mask
