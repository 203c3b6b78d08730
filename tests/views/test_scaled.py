"""Photographs that are decoded no larger than their views need: the same draws, nearly the same views, less memory."""

import io
import logging
import math

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from training.benchmarks.measure import PeakMemory, in_own_process
from training.data.decode import Decoder
from training.data.images import MapImages
from training.data.pipeline import training_images
from training.data.sources import DataArguments, ImageSplits
from training.views.device import DeviceCrops, DeviceViews
from training.views.opencv import render_view_cv2
from training.views.pil import Views, render_view
from training.views.policy import build_policies, sample_view, seeded_generator
from training.views.scaled import Encoded, Scaled, find_scale

SIZE = 24
DECODER = Decoder()
CROPS = build_policies("crop", min_scale=0.2)
BACKENDS = {
    "pil": (Views(CROPS, SIZE, render_view), DECODER.image),
    "cv2": (Views(CROPS, SIZE, render_view_cv2), DECODER.tensor),
    "device": (DeviceCrops(CROPS, SIZE), DECODER.tensor),
}


def photograph(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Soft shapes of all hues with grain, like a photograph in what matters to filters."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = random.normal(0, 4, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).convert(mode)


def row(image: Image.Image, format: str = "JPEG", orientation: int = 1, **options) -> dict:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file := io.BytesIO(), format, exif=exif, **{"quality": 95, "subsampling": 0} | options)
    return {"bytes": file.getvalue(), "path": None}


def both_views(backend: str, picture: dict, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The views of the whole image, and those of it decoded as small as they allow: each (S, S, 3)."""
    transform, whole = BACKENDS[backend]
    found = []
    for image in (whole(picture), DECODER.encoded(picture, whole)):
        views = transform(image, seeded_generator(seed))
        if "numbers" in views:
            views = DeviceViews(CROPS, SIZE)({name: x[None] for name, x in views.items()})
            views = {name: x[0] for name, x in views.items()}
        found.append([x.permute(1, 2, 0).numpy().astype(int) for x in views.values()])
    return found[0], found[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_views_of_a_scaled_image_are_nearly_those_of_the_whole_one(orientation, backend):
    # No side is a multiple of 8, so that the last column and row have part of a pixel, wherever the turn brings them.
    picture = row(photograph(orientation, 301, 227), orientation=orientation)
    for seed in range(6):
        for whole, scaled in zip(*both_views(backend, picture, seed), strict=True):
            assert whole.shape == scaled.shape == (SIZE, SIZE, 3)
            assert np.abs(whole - scaled).mean() < 2.0  # 7 and more where the origin is left out
            assert abs((whole - scaled).mean()) < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_same_numbers_are_drawn(orientation, backend):
    transform, whole = BACKENDS[backend]
    picture = row(photograph(0, 301, 227), orientation=orientation)
    drawn = []
    for image in (whole(picture), DECODER.encoded(picture, whole)):
        generator = seeded_generator(5)
        drawn.append((transform.sample(image, generator), torch.rand(1, generator=generator)))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "picture",
    [row(photograph(1, 50, 38)), row(photograph(1, 300, 226), "PNG"), row(photograph(1, 300, 226, "L"), "WEBP")],
    ids=["small", "PNG", "WEBP"],
)
def test_what_is_not_scaled_has_exactly_the_views_of_the_whole_image(picture, backend):
    for seed in range(4):
        for whole, scaled in zip(*both_views(backend, picture, seed), strict=True):
            assert np.array_equal(whole, scaled)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("L", {}),
        ("CMYK", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 2}),
        ("RGB", {"format": "MPO", "save_all": True, "append_images": [photograph(9, 304, 232)]}),
    ],
)
def test_every_kind_of_jpeg_is_scaled(mode, options):
    picture = row(photograph(2, 304, 232, mode), **options)
    image = DECODER.encoded(picture, DECODER.image)
    assert isinstance(image, Encoded)
    for scale in (2, 4, 8):
        scaled = image.scaled(scale)
        assert (scaled.image.mode, scaled.image.size) == ("RGB", (304 // scale, 232 // scale))
        expected = DECODER.image(picture).reduce(scale)  # the mean of each square of pixels
        assert np.abs(np.asarray(scaled.image).astype(int) - np.asarray(expected)).mean() < 1.5


# Boxes


def naive_crop(pixels: np.ndarray, edges: tuple[float, float, float, float], size: int) -> np.ndarray:
    """A crop (size, size) of grey levels (H, W), resized by triangles in float64; the box is (left, top, right, bottom)."""

    def weights(start: float, stop: float, count: int) -> np.ndarray:
        step = (stop - start) / size
        half = max(step, 1.0)
        matrix = np.zeros((size, count))
        for i in range(size):
            centre = start + (i + 0.5) * step
            for j in range(max(math.floor(start), 0), math.ceil(stop)):
                matrix[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / half)
        return matrix / matrix.sum(axis=1, keepdims=True)

    left, top, right, bottom = edges
    return weights(top, bottom, pixels.shape[0]) @ pixels @ weights(left, right, pixels.shape[1]).T


@pytest.mark.parametrize("origin", [(0.0, 0.0), (0.5, 0.75)])
@pytest.mark.parametrize("box", [(0, 0, 116, 152), (13, 22, 97, 101), (3, 5, 100, 130)])
def test_a_box_is_cropped_between_pixels(box, origin):
    image = photograph(3, 40, 30)
    top, left, height, width = (side / 4 for side in box)
    edges = (left + origin[0], top + origin[1], left + width + origin[0], top + height + origin[1])
    found = np.asarray(Scaled(image, 4, origin).crop(box, 12)).astype(float)
    for channel in range(3):
        expected = naive_crop(np.asarray(image)[..., channel].astype(float), edges, 12)
        assert np.abs(found[..., channel] - expected).max() <= 1.01  # PIL rounds after each direction


@given(
    sides=st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
    size=st.integers(16, 512),
    min_scale=st.sampled_from([0.08, 0.2, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_a_scale_is_the_largest_that_leaves_every_view_its_pixels_and_bounds_the_memory(sides, size, min_scale, seed):
    width, height = sides
    policies = build_policies("crop", min_scale=min_scale)
    generator = seeded_generator(seed)
    boxes = [sample_view(policy, width, height, generator).box for policy in policies]
    scale = find_scale(boxes, size)
    assert scale in (1, 2, 4, 8)
    enough = [s for s in (2, 4, 8) if all(h >= s * size and w >= s * size for _, _, h, w in boxes)]
    assert scale == max(enough, default=1)
    if scale < 8 and max(sides) <= 1.3 * min(sides):  # then every box has the ratio and the area that were drawn
        shortest = math.sqrt(0.75 * min_scale * width * height) - 1
        if shortest > 0:
            assert width * height / scale**2 <= (2 * size + 1) ** 2 / (0.75 * min_scale) * 1.1


def peak_of_views(content: bytes, scaled: bool) -> int:
    """Bytes that the views of a photograph take in a process that has made those of another."""
    views, decoder = Views(CROPS, 96, render_view_cv2), Decoder()
    picture = {"bytes": content, "path": None}

    def make(one: dict) -> None:
        views(decoder.encoded(one, decoder.tensor) if scaled else decoder.tensor(one), seeded_generator(0))

    make(row(photograph(0, 600, 500)))
    with PeakMemory() as memory:
        make(picture)
    return memory.bytes


@pytest.mark.slow
def test_a_large_photograph_takes_no_more_memory_than_its_views_need():
    content = row(photograph(0, 4000, 3000), subsampling=2, quality=80)["bytes"]
    pixels = 3 * 4000 * 3000
    assert in_own_process(peak_of_views, content, False) > pixels
    assert (
        in_own_process(peak_of_views, content, True) < pixels / 6
    )  # a 1/8 has 1/64 of them; with its file and its views


# Damaged files


@pytest.mark.parametrize("cut", [2, 300, 2000, 0.5, 0.99])
def test_a_truncated_photograph_is_refused_as_before(cut):
    content = row(photograph(4, 301, 227))["bytes"]
    damaged = {"bytes": content[: cut if cut >= 1 else int(cut * len(content))], "path": None}
    for transform, whole in BACKENDS.values():
        for decode in (whole, lambda x, whole=whole: DECODER.encoded(x, whole)):
            with pytest.raises(OSError, match=r"."):
                transform(decode(damaged), seeded_generator(0))


@pytest.mark.parametrize("backend", ["pil", "cv2", "device"])
def test_a_run_with_scaled_images_replaces_the_damaged_ones(backend, caplog):
    pictures = [row(photograph(i, 300, 220)) for i in range(4)]
    pictures[1]["bytes"] = pictures[1]["bytes"][:-3000]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": pictures}, features=features)
    images = {}
    for decode in ("exact", "scaled"):
        data = DataArguments(image_size=32, view_backend=backend, decode=decode)
        with caplog.at_level(logging.WARNING):
            images[decode] = training_images(data, ImageSplits(rows, None, []), _Run())
            assert isinstance(images[decode], MapImages)
            views = [images[decode][i] for i in range(4)]
        assert images[decode].unreadable() == ["row 1"]
        assert torch.equal(views[1]["pixel_values"], views[2]["pixel_values"])
        assert [record.message for record in caplog.records if "row 1" in record.message]
        caplog.clear()
    assert not torch.equal(images["exact"][0]["pixel_values"], images["scaled"][0]["pixel_values"])


class _Run:
    seed, per_device_train_batch_size, process_index, world_size, dataloader_num_workers = 0, 2, 0, 1, 0


def test_a_file_is_read_where_the_dataset_lies_and_nowhere_else(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(row(photograph(5, 300, 220))["bytes"])
    here = Decoder(places=(f"{tmp_path}/",))
    image = here.encoded({"bytes": None, "path": str(path)}, here.tensor)
    path.unlink()  # it was read once
    assert image.scaled(4).image.size == (75, 55)
    assert image.whole().shape == (3, 220, 300)
    with pytest.raises(OSError, match="only a folder of images"):
        DECODER.encoded({"bytes": None, "path": str(path)}, DECODER.image)
    small = Decoder(max_pixels=100)
    with pytest.raises(OSError, match="at most 100 are read"):
        small.encoded(row(photograph(5, 300, 220)), small.image)
