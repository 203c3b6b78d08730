"""One small set of images with boxes, in every form that `load_detection` reads."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

CLASSES = ["cat", "dog", "fox"]
# Of each image: width and height, boxes (left, top, right, bottom), class numbers, crowd flags, difficult flags.
TRAIN = [
    ((40, 30), [[2, 3, 20, 25], [10, 5, 40, 30]], [0, 2], [0, 0], [0, 1]),
    ((30, 40), [[0, 0, 30, 40]], [1], [0], [0]),
    ((32, 32), [], [], [], []),
    ((48, 20), [[5, 5, 15, 15], [20, 2, 40, 18]], [1, 0], [0, 1], [0, 0]),
    ((36, 30), [[1, 1, 9, 9]], [2], [1], [0]),
]
TEST = [
    ((44, 33), [[4, 4, 30, 30]], [2], [0], [1]),
    ((31, 45), [], [], [], []),
    ((40, 40), [[0, 10, 12, 22], [30, 30, 39, 39]], [0, 1], [0, 0], [0, 0]),
]
SPLITS = {"train": TRAIN, "test": TEST}


def picture(size: tuple[int, int], number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def xywh(box: list[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def rectangle(box: list[int], size: tuple[int, int]) -> dict:
    """The RLE of a box whose sides are whole pixels."""
    width, height = size
    mask = np.zeros((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    return {"size": [height, width], "counts": counts if not flat[0] else [0, *counts]}


def polygon(box: list[int]) -> list[list[float]]:
    return [[box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]]


def write_coco(folder: Path, splits=SPLITS) -> Path:
    for split, images in splits.items():
        (folder / split).mkdir(parents=True)
        content: dict = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": 7 * number + 3, "name": name} for number, name in enumerate(CLASSES)][::-1]
        for number, (size, boxes, labels, crowds, _) in enumerate(images):
            (folder / split / f"{number}.png").write_bytes(picture(size, number))
            image = {"id": 100 + number, "file_name": f"{number}.png", "width": size[0], "height": size[1]}
            content["images"].append(image)
            for box, label, crowd in zip(boxes, labels, crowds, strict=True):
                content["annotations"].append(
                    {
                        **{"id": len(content["annotations"]) + 1, "image_id": 100 + number},
                        **{"category_id": 7 * label + 3, "bbox": xywh(box), "iscrowd": crowd},
                        **{"area": float(np.prod(xywh(box)[2:]))},
                        "segmentation": rectangle(box, size) if crowd else polygon(box),
                    }
                )
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def write_voc(folder: Path, years: dict[str, str] | None = None, splits=SPLITS) -> Path:
    """A VOCdevkit; `years` has the year of each split. VOC has no crowds: those boxes are plain ones there."""
    for number_of_split, (split, images) in enumerate(splits.items()):
        year = folder / f"VOC{(years or {}).get(split, '2007')}"
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (year / name).mkdir(parents=True, exist_ok=True)
        names = []
        for number, (size, boxes, labels, _, difficult) in enumerate(images):
            name = f"{number_of_split}{number:05d}"
            names.append(name)
            (year / "JPEGImages" / f"{name}.png").write_bytes(picture(size, number))
            objects = "".join(
                f"<object><name>{CLASSES[label]}</name><difficult>{hard}</difficult><bndbox><xmin>{box[0] + 1}</xmin>"
                f"<ymin>{box[1] + 1}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
                for box, label, hard in zip(boxes, labels, difficult, strict=True)
            )
            xml = f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}</annotation>"
            (year / "Annotations" / f"{name}.xml").write_text(xml)
        (year / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        (year / "ImageSets/Main" / f"cat_{split}.txt").write_text("".join(f"{name} -1\n" for name in names))
    return folder


def objects_of(image, form: str = "xywh", names: bool = False, masks: bool = False) -> dict:
    size, boxes, labels, crowds, difficult = image
    found = {
        "bbox": [[float(x) for x in (xywh(box) if form == "xywh" else box)] for box in boxes],
        "category": [CLASSES[label] for label in labels] if names else labels,
        "iscrowd": [bool(crowd) for crowd in crowds],
        "difficult": [bool(hard) for hard in difficult],
    }
    return found | ({"segmentation": [rectangle(box, size) for box in boxes]} if masks else {})


def write_metadata(folder: Path) -> Path:
    for split, images in SPLITS.items():
        (folder / split).mkdir(parents=True)
        lines = []
        for number, image in enumerate(images):
            (folder / split / f"{number}.png").write_bytes(picture(image[0], number))
            objects = objects_of(image, names=True)
            lines.append(json.dumps({"file_name": f"{number}.png", "objects": objects}))
        (folder / split / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def write_parquet(
    folder: Path, form: str = "xywh", structs: bool = False, sizes: bool = True, masks: bool = False, splits=SPLITS
) -> Path:
    """Parquet files; `structs` for a list of structs instead of a struct of lists."""
    folder.mkdir()
    kinds = {
        "bbox": datasets.List(datasets.Value("float32"), length=4),
        "category": datasets.ClassLabel(names=CLASSES),
        **{"iscrowd": datasets.Value("bool"), "difficult": datasets.Value("bool")},
    }
    if masks:
        counts = datasets.List(datasets.Value("int64"))
        kinds["segmentation"] = {"size": datasets.List(datasets.Value("int64")), "counts": counts}
    objects = datasets.List(kinds) if structs else {name: datasets.List(kind) for name, kind in kinds.items()}
    for split, images in splits.items():
        rows = []
        for number, image in enumerate(images):
            columns = objects_of(image, form, masks=masks)
            if structs:
                columns = [dict(zip(columns, one, strict=True)) for one in zip(*columns.values(), strict=True)]
            row = {"image": {"bytes": picture(image[0], number), "path": None}, "objects": columns}
            rows.append(row | ({"width": image[0][0], "height": image[0][1]} if sizes else {}))
        features = {"image": datasets.Image(), "objects": objects}
        if sizes:
            features |= {"width": datasets.Value("int64"), "height": datasets.Value("int64")}
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder
