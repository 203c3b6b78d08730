"""What the policies of published recipes drew when this record was made is what they draw now, by every back end and reader.

A run that is continued, and a number that is reproduced, rely on it. This file, started as a script, made the record.
"""

import json
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from training.data.images import collate
from training.data.memory_images import MemoryImages
from training.data.pipeline import build_render, training_images
from training.data.sources import DataArguments, load_images

RECORD = Path(__file__).parents[1] / "records" / "view_draws.json"
POLICIES = ("v1", "v2", "cifar", "crop")
BACKENDS = {"pil": 90, "cv2": 90, "device": 90, "memory": 32}  # width of the images in pixels
IMAGES, BATCH = 6, 2
TRAINING = SimpleNamespace(
    seed=7, per_device_train_batch_size=BATCH, process_index=0, world_size=1, dataloader_num_workers=0
)


def write_images(folder: Path, width: int) -> None:
    """Soft shapes without noise, so that another decoder or filter hardly changes their means."""
    coarse = np.random.default_rng(width).integers(0, 256, (IMAGES, 5, 6, 3), dtype=np.uint8)
    pictures = [Image.fromarray(x).resize((width, 2 * width // 3 if width > 32 else width), 2) for x in coarse]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": pictures}, features=features).to_parquet(folder / "train.parquet")


def views_of(folder: Path, policy: str, backend: str, streaming: bool = False) -> tuple[list, dict[str, torch.Tensor]]:
    """Of every image in epoch 3: the parameters of its views, and its rendered views (N, 3, S, S); of a stream in its order."""
    data = DataArguments(
        dataset_name=str(folder),
        augmentation=policy,
        view_backend="device" if backend == "memory" else backend,
        streaming=streaming,
        image_size=24,
    )
    splits = load_images(data)
    images = training_images(data, splits, TRAINING)
    assert isinstance(images, MemoryImages) == (backend == "memory")
    images.set_epoch(3)
    params = [images.view_params(i, splits.decoder.image(row["image"])) for i, row in enumerate(splits.train)]
    if backend == "memory":
        batch = images.with_pixels(images.__getitems__(list(range(IMAGES))))
    else:
        batch = collate(list(images) if streaming else [images[i] for i in range(IMAGES)])
    render = build_render(data, compiled=False)
    return params, render(batch) if render else batch


def numbers_of(params) -> list[float]:
    jitter = [number for name, factor in params.jitter for number in ("bcsh".index(name[0]), factor)]
    return [*params.box, *jitter, params.gray, params.blur, params.flip]


def in_numbers(params: list, views: dict[str, torch.Tensor]) -> dict[str, list]:
    """The drawn numbers of every view of every image, and the mean colours of its rendered views."""
    means = torch.stack(list(views.values()), dim=1).float().mean(dim=(3, 4))  # (N, V, 3)
    return {"draws": [[numbers_of(view) for view in both] for both in params], "means": means.tolist()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    def made(width: int) -> Path:
        folder = tmp_path_factory.mktemp(f"images{width}")
        write_images(folder, width)
        return folder

    return cache(made)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_draws_and_views_are_those_of_the_record(policy, backend, folders):
    folder, recorded = folders(BACKENDS[backend]), json.loads(RECORD.read_text())[policy][backend]
    params, views = views_of(folder, policy, backend)
    found = in_numbers(params, views)
    for drawn, right in zip(found["draws"], recorded["draws"], strict=True):
        assert [pytest.approx(view, abs=1e-5) for view in right] == drawn
    difference = np.abs(np.subtract(found["means"], recorded["means"]))
    assert difference.max() < 1.5  # levels of 255: other versions of the libraries round otherwise
    if backend != "memory":
        streamed_params, streamed = views_of(folder, policy, backend, streaming=True)
        assert streamed_params == params
        for name, view in views.items():
            assert {x.numpy().tobytes() for x in streamed[name]} == {x.numpy().tobytes() for x in view}


if __name__ == "__main__":
    record: dict = {}
    for backend, width in BACKENDS.items():
        with TemporaryDirectory() as folder:
            write_images(Path(folder), width)
            for policy in POLICIES:
                record.setdefault(policy, {})[backend] = in_numbers(*views_of(Path(folder), policy, backend))
    text = json.dumps(record)
    text = json.dumps(json.loads(text, parse_float=lambda x: round(float(x), 6)))
    (Path(sys.argv[1]) if sys.argv[1:] else RECORD).write_text(text + "\n")
