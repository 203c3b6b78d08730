"""Views by OpenCV and on the device against the reference, PIL: the same parameters give the same view."""

import io
import shutil
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from single_policies import single_policies

import training.views.device
from training.benchmarks.measure import PeakMemory, in_own_process
from training.data.decode import decode_image, decode_tensor
from training.data.images import collate
from training.data.memory_images import MemoryImages
from training.views.device import (
    BLUR,
    BOX_NUMBERS,
    FACTORS,
    FLIP,
    GRAY,
    JITTER,
    ORDER,
    SOLARIZE,
    DeviceCrops,
    DeviceViews,
    crop_views,
    params_of,
    sample_box,
    sample_boxes,
    sample_operations,
    sample_views,
    uniform_numbers,
    unpack_params,
)
from training.views.opencv import crop_and_resize, render_view_cv2
from training.views.pil import Views, render_view
from training.views.policy import VIEWS, ViewParams, ViewPolicy, build_policies, sample_view, seeded_generator

SIZE, SAMPLES = 48, 4000
SINGLE_POLICIES = single_policies()
V2, CIFAR = build_policies("v2"), build_policies("cifar")
LEVELS = 2  # of 255: how far the mean pixel of a view may be from the reference


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Soft shapes with some grain, all hues: like a photograph in what matters to filters."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = random.normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.dtype == b.dtype == torch.uint8
    return (a.float() - b.float()).abs().mean().item()


def pack_params(params: ViewParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The parameters of a view as a box (4,) and a row of operations: the inverse of `unpack_params`."""
    order = [JITTER.index(name) for name, _ in params.jitter] or [-1] * 4
    factors = [dict(params.jitter).get(name, 0.0) for name in JITTER]
    row = [*order, *factors, params.gray, params.blur, params.flip, params.solarize]
    return torch.tensor(params.box, dtype=torch.float32), torch.tensor(row, dtype=torch.float32)


def pack_all(sampled: list[ViewParams]) -> tuple[torch.Tensor, torch.Tensor]:
    boxes, rows = zip(*map(pack_params, sampled), strict=True)
    return torch.stack(boxes), torch.stack(rows)


def on_device(images: torch.Tensor, sampled: list[ViewParams], policy, size: int) -> torch.Tensor:
    """A view of every image with these parameters, all in one batch."""
    views, (boxes, rows) = DeviceViews((policy,), size), pack_all(sampled)
    return views.render(views.crop(images, boxes, rows[:, FLIP] > 0), rows, policy)


@pytest.fixture(params=["by order", "all at once"])
def way(request, monkeypatch):
    """Both ways of `DeviceViews`: that of a CPU, and that of a GPU on this CPU."""
    if request.param == "all at once":
        monkeypatch.setattr(training.views.device, "_all_at_once", lambda x: True)


@pytest.mark.parametrize("name", SINGLE_POLICIES)
def test_the_same_parameters_give_the_same_views(name, way):
    policy, generator = SINGLE_POLICIES[name], torch.Generator().manual_seed(3)
    images = [picture(seed, 96, 72) for seed in range(120)]
    sampled = [sample_view(policy, 96, 72, generator) for _ in images]
    expected = [render_view(image, params, SIZE, policy) for image, params in zip(images, sampled, strict=True)]
    tensors = [to_tensor(image) for image in images]
    by_cv2 = [render_view_cv2(image, params, SIZE, policy) for image, params in zip(tensors, sampled, strict=True)]
    by_device = on_device(torch.stack(tensors), sampled, policy, SIZE)
    # Two factors after one another multiply what rounding has left before them.
    limit = LEVELS * ((1 + max(policy.jitter[:3])) / 1.4) ** 2
    for views in (by_cv2, by_device):
        distances = [distance(view, reference) for view, reference in zip(views, expected, strict=True)]
        assert max(distances) < limit, sampled[int(np.argmax(distances))]
        assert np.mean(distances) < 1


WHOLE = ViewParams((0, 0, SIZE, SIZE), jitter=(), gray=False, blur=0.0, flip=False)
SINGLE = {
    **{f"{name} {factor}": replace(WHOLE, jitter=((name, factor),)) for name in JITTER[:3] for factor in (0.6, 1.4)},
    **{f"hue {shift}": replace(WHOLE, jitter=(("hue", shift),)) for shift in (-0.4, -0.05, 0.05, 0.4)},
    "gray": replace(WHOLE, gray=True),
    "solarize": replace(WHOLE, solarize=True),
    "blur, then solarize": replace(WHOLE, blur=2.0, solarize=True),
    "flip": replace(WHOLE, flip=True),
    **{f"blur {sigma}": replace(WHOLE, blur=sigma) for sigma in (0.2, 1.0, 2.0)},
    "crop": replace(WHOLE, box=(3, 7, 20, 31)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_every_operation_is_the_references(name, way):
    image, params, policy = picture(0, SIZE, SIZE), SINGLE[name], ViewPolicy(blur_p=0.5, solarize_p=0.5)
    expected = render_view(image, params, SIZE, policy)
    assert name == "crop" or distance(expected, to_tensor(image)) > LEVELS or name == "blur 0.2"
    assert distance(render_view_cv2(to_tensor(image), params, SIZE, policy), expected) < 1
    whole_order = replace(params, jitter=params.jitter and (*params.jitter, *NEUTRAL[params.jitter[0][0]]))
    assert distance(on_device(to_tensor(image)[None], [whole_order], policy, SIZE)[0], expected) < 1


# Jitter always has all four operations; these change nothing.
NEUTRAL = {name: tuple((other, 0.0 if other == "hue" else 1.0) for other in JITTER if other != name) for name in JITTER}


@pytest.mark.parametrize("width", [20, 48, 200])
def test_crops_are_resized_with_the_filter_of_pil(width):
    image, box = picture(1, width, 3 * width // 4), (2, 3, width // 2, 2 * width // 3)
    top, left, h, w = box
    expected = torch.from_numpy(
        np.array(image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.BILINEAR))
    ).permute(2, 0, 1)
    batch, boxes = to_tensor(image)[None].float(), torch.tensor([box], dtype=torch.float32)
    for flip in (False, True):
        crop = crop_views(batch, boxes, torch.tensor([flip]), SIZE)[0]
        assert_close(crop.flip(-1) if flip else crop, expected)
    assert_close(crop_and_resize(to_tensor(image), box, SIZE).float(), expected)


def assert_close(crop: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (crop - expected).abs()  # PIL's weights are whole numbers
    assert difference.max() <= 2
    assert difference.mean() < 0.3


UNEQUAL = {
    "one for both": V2,
    "unequal": (CIFAR[0], ViewPolicy(min_scale=0.9, solarize_p=0.8, blur_p=1.0)),
    "one": V2[:1],
}


@pytest.mark.parametrize("policies", UNEQUAL.values(), ids=UNEQUAL)
def test_crops_of_the_cpu_become_the_references_views(policies, way):
    pictures = [picture(seed, 90 + seed, 120) for seed in range(8)]
    crops = DeviceCrops(policies, SIZE)
    rows = [crops(to_tensor(image), seeded_generator(seed)) for seed, image in enumerate(pictures)]
    views = DeviceViews(policies, SIZE)(collate(rows))
    assert tuple(views) == VIEWS[: len(policies)]
    for seed, image in enumerate(pictures):
        sampled = crops.sample(image, seeded_generator(seed))
        for params, name, policy in zip(sampled, views, policies, strict=True):
            assert distance(views[name][seed], render_view(image, params, SIZE, policy)) < LEVELS


def test_the_two_crops_of_an_image_are_sampled_from_its_generator():
    crops, image = DeviceCrops(V2, SIZE), to_tensor(picture(0, 400, 300))
    sampled = [crops.sample(image, seeded_generator(seed)) for seed in range(200)]
    assert crops.sample(image, seeded_generator(7)) == sampled[7]
    assert len(set(chain(*sampled))) == 400
    boxes, _ = pack_all(list(chain(*sampled)))
    assert same_distribution(boxes[:, 2:].prod(dim=1), batch_boxes(V2[0], SAMPLES)[:, 2:].prod(dim=1))  # areas


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("policies", [V2, build_policies("v3")], ids=["v2", "v3"])
def test_compiled_views_are_the_same(policies):
    images = torch.stack([to_tensor(picture(seed, 40, 40)) for seed in range(16)])
    boxes, numbers = sample_views(policies, 40, 40, seed=0, epoch=0, indices=np.arange(16))
    batch = {"images": images, "boxes": boxes, "numbers": numbers, "index": torch.arange(16)}
    render = DeviceViews(policies, SIZE)
    eager = render(batch)
    compiled = torch.compile(render.__call__)(batch)
    assert torch.equal(compiled.pop("index"), eager.pop("index"))
    for name, views in compiled.items():
        assert (views.float() - eager[name].float()).abs().max() <= 2
        assert distance(views, eager[name]) < 0.01


# Draws


def test_packed_parameters_unpack_to_themselves():
    generator = torch.Generator().manual_seed(0)
    for policy in SINGLE_POLICIES.values():
        for _ in range(50):
            params = sample_view(policy, 64, 48, generator)
            copy = unpack_params(*pack_params(params))
            assert (copy.box, copy.gray, copy.flip) == (params.box, params.gray, params.flip)
            assert copy.solarize == params.solarize
            assert copy.blur == pytest.approx(params.blur)
            assert [name for name, _ in copy.jitter] == [name for name, _ in params.jitter]
            assert [f for _, f in copy.jitter] == pytest.approx([f for _, f in params.jitter])


def batch_operations(
    policy, count: int, width: int = 400, height: int = 300, **key
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (count, 4) and rows of operations of the first so many images."""
    key = {"seed": 1, "epoch": 2, "indices": np.arange(count)} | key
    boxes, numbers = sample_views((policy,), width, height, **key)
    return boxes[:, 0], sample_operations(numbers[:, 0], policy)


def batch_boxes(policy, count: int, *size: int) -> torch.Tensor:
    return batch_operations(policy, count, *size)[0]


@pytest.mark.parametrize("name", ["v1", "v2", "crop", "v3, key"])  # others are like these, in other strengths
def test_operations_of_a_batch_are_distributed_as_those_of_single_images(name):
    policy, generator = SINGLE_POLICIES[name], torch.Generator().manual_seed(0)
    boxes, batch = batch_operations(policy, SAMPLES)
    single_boxes, single = pack_all([sample_view(policy, 400, 300, generator) for _ in range(SAMPLES)])
    for column in (GRAY, FLIP, SOLARIZE, ORDER.start):
        shares = [(operations[:, column] > 0).float().mean().item() for operations in (batch, single)]
        assert shares[0] == pytest.approx(shares[1], abs=0.04)  # more than three standard errors
    jittered = [operations[operations[:, ORDER.start] >= 0] for operations in (batch, single)]
    assert len(jittered[0]) / SAMPLES == pytest.approx(policy.jitter_p, abs=0.03)
    if policy.jitter_p:
        orders = [
            (operations[:, ORDER] @ torch.tensor([64.0, 16.0, 4.0, 1.0])).unique(return_counts=True)
            for operations in jittered
        ]
        assert torch.equal(orders[0][0], orders[1][0])  # all 24
        assert orders[0][1].min() > 0.6 * len(jittered[0]) / 24
        for column in range(FACTORS.start, FACTORS.stop):
            assert same_distribution(*(operations[:, column] for operations in jittered))
    if policy.blur_p:
        assert same_distribution(*(operations[operations[:, BLUR] > 0, BLUR] for operations in (batch, single)))
        assert (batch[:, BLUR] > 0).float().mean().item() == pytest.approx(policy.blur_p, abs=0.03)
    for measure in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert same_distribution(measure(boxes), measure(single_boxes))


def same_distribution(a: torch.Tensor, b: torch.Tensor) -> bool:
    return ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-3


def correlations(columns: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """Of columns (D,) with each other, theirs with themselves as 0, and with the numbers of the boxes (D, 4)."""
    found = torch.corrcoef(torch.stack([*columns, *boxes.T]).double())
    return found[: len(columns)].fill_diagonal_(0)


def test_the_parameters_of_a_view_are_independent():
    boxes, operations = batch_operations(ViewPolicy(blur_p=0.5, solarize_p=0.5), 40_000)
    first, blur, factors = operations[:, ORDER.start], operations[:, BLUR], list(operations[:, FACTORS].T)
    jittered, blurred = first >= 0, blur > 0
    columns = [jittered, operations[:, GRAY], blurred, operations[:, FLIP], operations[:, SOLARIZE], *factors]
    assert correlations(columns, boxes).abs().max() < 0.025  # five standard errors
    both = jittered & blurred  # others have no order, or no deviation
    others = [operations[:, column] for column in (GRAY, FLIP, SOLARIZE)]
    columns = [column[both] for column in (first, blur, *others, *factors)]
    assert correlations(columns, boxes[both]).abs().max() < 0.04


def test_each_view_of_a_batch_follows_its_own_policy():
    policies = ViewPolicy(min_scale=0.9), ViewPolicy(min_scale=0.08, solarize_p=0.2, blur_p=0.1)
    boxes, numbers = sample_views(policies, 400, 300, seed=1, epoch=2, indices=np.arange(SAMPLES))
    smallest = (boxes[:, :, 2] * boxes[:, :, 3]).amin(dim=0) / (400 * 300)
    assert smallest[0] > 0.89
    assert 0.075 < smallest[1] < 0.1
    in_memory = [params_of(*both, policies) for both in zip(boxes[:250], numbers[:250], strict=True)]
    crops, image = DeviceCrops(policies, SIZE), torch.zeros(3, 300, 400)
    for pairs in (in_memory, [crops.sample(image, seeded_generator(seed)) for seed in range(250)]):
        query, key = zip(*pairs, strict=True)
        assert not any(view.solarize or view.blur for view in query)
        assert sum(view.solarize for view in key) / 250 == pytest.approx(0.2, abs=0.1)  # four standard errors
        assert sum(view.blur > 0 for view in key) / 250 == pytest.approx(0.1, abs=0.08)
        assert min(view.box[2] * view.box[3] for view in query) > 0.89 * 400 * 300


SIZES = ((400, 300), (32, 32), (500, 20), (20, 500), (1, 1))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_boxes_lie_within_the_image_and_are_the_same_one_by_one(width, height):
    top, left, h, w = batch_boxes(V2[0], 500, width, height).T
    assert ((top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (top + h <= height) & (left + w <= width)).all()
    u = uniform_numbers(0, 0, np.arange(500), BOX_NUMBERS)
    one_by_one = [sample_box(row, width, height, 0.2) for row in u.tolist()]
    assert np.array_equal(sample_boxes(u, width, height, 0.2), one_by_one)


def test_where_no_box_fits_it_is_the_largest_centred_one():
    boxes = batch_boxes(V2[0], 500, 500, 20)
    assert (boxes == torch.tensor([0.0, (500 - 27) // 2, 20, 27])).all(dim=1).any()  # 27 = 20 * 4 / 3


def test_sampled_views_depend_on_seed_epoch_and_index_alone():
    u = uniform_numbers(1, 2, np.arange(1000), 40)
    assert ((u >= 0) & (u < 1)).all()
    assert len(np.unique(u)) > 0.99 * u.size  # no image has numbers of its neighbour
    assert np.array_equal(uniform_numbers(1, 2, np.array([40, 3]), 40), u[[40, 3]])
    for other in ((2, 2), (1, 3)):
        assert np.mean(uniform_numbers(*other, np.arange(1000), 40) == u) < 1e-3
    indices = {"seed": 1, "epoch": 2, "indices": np.arange(64)}
    boxes, numbers = sample_views(V2, 400, 300, **indices)
    assert len(boxes.flatten(0, 1).unique(dim=0)) == len(numbers.flatten(0, 1).unique(dim=0)) == 128


# Decoding


def encoded(image: Image.Image, format: str, **options) -> dict:
    file = io.BytesIO()
    image.save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_jpeg_files_decode_to_the_pixels_of_pil(mode, options):
    row = encoded(picture(5, 61, 43).convert(mode), "JPEG", quality=90, **options)
    assert torch.equal(decode_tensor(row), to_tensor(decode_image(row)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_files_are_turned_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(6, 40, 24).save(tmp_path / "turned.jpg", exif=exif)
    row = {"bytes": (tmp_path / "turned.jpg").read_bytes(), "path": None}
    assert torch.equal(decode_tensor(row), to_tensor(decode_image(row)))


@pytest.mark.parametrize("place", ["alone", "after EXIF"])
def test_jpeg_files_are_turned_upright_by_their_xmp(place):
    exif = Image.Exif()
    exif[0x010F] = "maker" * 2000
    options = {"exif": exif} if place == "after EXIF" else {}
    row = encoded(picture(6, 40, 24), "JPEG", xmp=b'<rdf:Description tiff:Orientation="6"/>', **options)
    assert decode_tensor(row).shape == (3, 40, 24)
    assert torch.equal(decode_tensor(row), to_tensor(decode_image(row)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_other_files_are_left_to_pil(mode):
    image = picture(7, 20, 30).convert("L" if mode == "I;16" else mode)
    row = encoded(image.convert("I;16") if mode == "I;16" else image, "PNG")
    assert torch.equal(decode_tensor(row), to_tensor(decode_image(row)))


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"no image"])
def test_what_is_no_image_is_refused_as_by_pil(content):
    with pytest.raises(OSError, match=r"."):
        decode_tensor({"bytes": content, "path": None})


def test_a_truncated_jpeg_is_refused():
    row = encoded(picture(8, 200, 200), "JPEG")
    with pytest.raises(OSError, match="truncated"):
        decode_tensor(row | {"bytes": row["bytes"][:2000]})


# Images in memory


def rows(images: list[Image.Image | None]) -> list[dict]:
    broken = {"bytes": b"broken", "path": None}
    return [{"image": broken if image is None else encoded(image, "PNG")} for image in images]


@pytest.mark.parametrize("policies", [CIFAR, build_policies("v3"), CIFAR[:1]], ids=["cifar", "v3", "one view"])
def test_images_in_memory_give_the_same_views_in_any_batch(policies):
    pictures = [picture(seed, 32, 32) for seed in range(12)]
    images = MemoryImages(rows(pictures), policies, seed=5)
    images.set_epoch(3)
    whole, part = (images.with_pixels(images.__getitems__(places)) for places in (list(range(12)), [7, 2]))
    assert torch.equal(whole["images"], torch.stack([to_tensor(image) for image in pictures]))
    render = DeviceViews(policies, 32)
    assert tuple(render(whole)) == VIEWS[: len(policies)]
    for name, views in render(whole).items():
        assert torch.equal(render(part)[name], views[[7, 2]])
    for params, name, policy in zip(images.view_params(2, pictures[2]), render(whole), policies, strict=True):
        expected = render_view(pictures[2], params, 32, policy)
        assert distance(render(whole)[name][2], expected) < LEVELS
    images.set_epoch(4)
    other = images.__getitems__([7, 2])
    assert not torch.equal(other["boxes"], part["boxes"])
    assert not torch.equal(other["numbers"], part["numbers"])


def test_processes_sample_disjoint_parts_of_the_images_in_memory():
    images = MemoryImages(rows([picture(seed, 8, 8) for seed in range(9)]), CIFAR)
    parts = [images.with_pixels(images.sample(4, 1, rank, 2))["images"] for rank in range(2)]
    assert len(torch.cat(parts).flatten(1).unique(dim=0)) == 8


def test_an_image_that_cannot_be_read_is_counted_and_replaced(caplog):
    good = [picture(seed, 16, 16) for seed in range(2)]
    images = MemoryImages(rows([None, good[0], good[1], None]), CIFAR)
    assert images.unreadable() == ["row 0", "row 3"]
    assert "row 3" in caplog.text
    expected = [good[0], good[0], good[1], good[1]]
    assert torch.equal(images.images, torch.stack([to_tensor(image) for image in expected]))
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        MemoryImages(rows([None]), CIFAR)


def test_images_of_several_sizes_are_refused_at_the_first_of_another_size(caplog):
    with pytest.raises(ValueError, match=r"have 8 x 9 and 8 x 8 pixels.*choose another --view_backend"):
        MemoryImages(rows([picture(0, 8, 9), picture(1, 8, 8), None]), CIFAR)
    assert caplog.text == ""  # the broken one was not met


def held_by_images(count: int) -> int:
    source = rows([picture(0, 64, 64)]) * count
    MemoryImages(source[:2], CIFAR)
    with PeakMemory() as memory:
        MemoryImages(source, CIFAR)
    return memory.bytes


@pytest.mark.slow
def test_images_in_memory_are_held_once_even_while_they_are_decoded():
    assert in_own_process(held_by_images, 4000) == pytest.approx(4000 * 3 * 64 * 64, rel=0.1)
    assert not MemoryImages(rows([picture(0, 8, 8)]), CIFAR).images.is_shared()  # /dev/shm may be small


def test_seeded_generators_serve_every_backend():
    image, views = picture(9, 64, 64), Views(V2, SIZE)
    by_cv2 = replace(views, render=render_view_cv2)
    key = (3, 1, 4)
    expected = views(image, seeded_generator(*key))
    for name, view in by_cv2(to_tensor(image), seeded_generator(*key)).items():
        assert distance(view, expected[name]) < LEVELS
