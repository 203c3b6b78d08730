"""Random views against torchvision's transforms, which the official code composes, and against their probabilities."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from single_policies import single_policies
from torchvision import transforms as T

from training.views.pil import EvaluationView, Views, render_view
from training.views.policy import ViewPolicy, build_policies, register_policy, sample_view, seeded_generator

SIZE, DRAWS = 32, 2000
POLICIES = single_policies()


class GaussianBlur:
    """The blur of the official loader: a radius sampled per image, PIL's filter."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(radius=torch.empty(1).uniform_(0.1, 2.0).item()))


REFERENCES = {
    "v1": [
        T.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        T.RandomGrayscale(p=0.2),
        T.ColorJitter(0.4, 0.4, 0.4, 0.4),
        T.RandomHorizontalFlip(),
    ],
    "v2": [
        T.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([GaussianBlur()], p=0.5),
        T.RandomHorizontalFlip(),
    ],
    # The notebook flips before the jitter; a flip commutes with operations on single pixels.
    "cifar": [
        T.RandomResizedCrop(SIZE),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomHorizontalFlip(),
    ],
    "crop": [T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip()],
    "simclr": [
        T.RandomResizedCrop(SIZE),
        T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([GaussianBlur()], p=0.5),
        T.RandomHorizontalFlip(),
    ],
    "v3, query": [
        T.RandomResizedCrop(SIZE),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        GaussianBlur(),
        T.RandomHorizontalFlip(),
    ],
    "v3, key": [
        T.RandomResizedCrop(SIZE),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([GaussianBlur()], p=0.1),
        T.RandomApply([ImageOps.solarize], p=0.2),
        T.RandomHorizontalFlip(),
    ],
}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def image_sizes(count: int) -> list[tuple[int, int]]:
    sizes = np.random.default_rng(0).integers(8, 200, (count, 2)).tolist()
    # Too long, too high, or too small for any random box.
    return [(500, 20), (20, 500), (90, 9), (1, 1), (3, 2), *map(tuple, sizes)]


@pytest.mark.parametrize("name", REFERENCES)
def test_views_equal_the_reference_transforms_with_the_same_seed(name):
    reference, policy = T.Compose([*REFERENCES[name], T.PILToTensor()]), POLICIES[name]
    for seed, (width, height) in enumerate(image_sizes(80)):
        image = noise(width, height, seed)
        torch.manual_seed(seed)
        expected = reference(image)
        params = sample_view(policy, width, height, torch.Generator().manual_seed(seed))
        view = render_view(image, params, SIZE, policy)
        assert torch.equal(view, expected), f"{width}x{height}, seed {seed}: {params}"


def test_drawing_leaves_the_generator_where_the_reference_leaves_it():
    for name, steps in REFERENCES.items():
        generator = torch.Generator().manual_seed(5)
        torch.manual_seed(5)
        for image in (noise(60, 40), noise(500, 20)):
            T.Compose(steps)(image)
            sample_view(POLICIES[name], *image.size, generator)
        assert torch.equal(generator.get_state(), torch.get_rng_state()), name


def test_very_long_images_give_the_largest_centred_box_of_an_allowed_shape():
    generator = torch.Generator().manual_seed(0)
    for policy in POLICIES.values():
        assert sample_view(policy, 500, 20, generator).box == (0, (500 - 27) // 2, 20, 27)  # 27 = 20 * 4 / 3
        assert sample_view(policy, 20, 500, generator).box == ((500 - 27) // 2, 0, 27, 20)


@pytest.fixture(scope="module", params=POLICIES)
def sampled(request):
    """A policy's name and its sampled for an image so large that rounding does not matter."""
    generator = torch.Generator().manual_seed(1)
    return request.param, [sample_view(POLICIES[request.param], 1000, 1000, generator) for _ in range(DRAWS)]


def test_operations_happen_as_often_as_published(sampled):
    name, views = sampled
    published = {
        "v1": {"jitter": 1.0, "gray": 0.2, "blur": 0.0, "flip": 0.5},
        "v2": {"jitter": 0.8, "gray": 0.2, "blur": 0.5, "flip": 0.5},
        "cifar": {"jitter": 0.8, "gray": 0.2, "blur": 0.0, "flip": 0.5},
        "crop": {"jitter": 0.0, "gray": 0.0, "blur": 0.0, "flip": 0.5},
        "simclr": {"jitter": 0.8, "gray": 0.2, "blur": 0.5, "flip": 0.5},
        "v3, query": {"jitter": 0.8, "gray": 0.2, "blur": 1.0, "flip": 0.5},
        "v3, key": {"jitter": 0.8, "gray": 0.2, "blur": 0.1, "flip": 0.5, "solarize": 0.2},
    }
    for operation, p in ({"solarize": 0.0} | published[name]).items():
        count = sum(bool(getattr(view, operation)) for view in views)
        assert abs(count - DRAWS * p) <= 4 * math.sqrt(DRAWS * p * (1 - p)), operation


def fills(values: list[float], low: float, high: float, gap: float = 0.01) -> bool:
    """Inside the range and within `gap` of its length from both ends."""
    gap *= high - low
    return low <= min(values) <= low + gap and high - gap <= max(values) <= high


def test_jitter_factors_fill_their_range_in_all_orders(sampled):
    name, views = sampled
    hue = {"v1": 0.4, "crop": 0.0, "simclr": 0.2}.get(name, 0.1)
    strength = 0.8 if name == "simclr" else 0.4
    saturation = 0.2 if name.startswith("v3") else strength
    jitters = [view.jitter for view in views if view.jitter]
    if not hue:
        assert not jitters
        return
    assert len({tuple(operation for operation, _ in jitter) for jitter in jitters}) == math.factorial(4)
    for operation, s in (("brightness", strength), ("contrast", strength), ("saturation", saturation)):
        assert fills([dict(jitter)[operation] for jitter in jitters], 1 - s - 1e-6, 1 + s + 1e-6), operation
    assert fills([dict(jitter)["hue"] for jitter in jitters], -hue - 1e-6, hue + 1e-6)


def test_boxes_and_blurs_fill_their_range(sampled):
    name, views = sampled
    smallest = {"v1": 0.2, "v2": 0.2}.get(name, 0.08)
    tops, lefts, heights, widths = np.array([view.box for view in views]).T
    # Boxes of nearly the whole image are rarer: they must be nearly square to fit.
    assert fills((heights * widths / 1e6).tolist(), smallest - 0.002, 1.0, gap=0.05)
    assert fills((widths / heights).tolist(), 3 / 4 - 0.005, 4 / 3 + 0.005, gap=0.02)
    assert (tops + heights).max() <= 1000
    assert (lefts + widths).max() <= 1000
    blurs = [view.blur for view in views if view.blur]
    assert fills(blurs, 0.1, 2.0, gap=0.03) if POLICIES[name].blur_p else not blurs


@pytest.mark.parametrize("name", ["v1", "v2", "cifar", "crop", "v3"])
def test_without_horizontal_flip_nothing_is_flipped_and_the_rest_stays(name):
    generator = torch.Generator().manual_seed(2)
    for policy, whole in set(zip(build_policies(name, horizontal_flip=False), build_policies(name), strict=True)):
        assert replace(policy, flip_p=0.5) == whole
        assert not any(sample_view(policy, 40, 30, generator).flip for _ in range(DRAWS))


def test_another_smallest_crop_changes_the_boxes_and_nothing_else():
    assert [replace(policy, min_scale=0.08) for policy in build_policies("v3", min_scale=0.2)] == list(
        build_policies("v3")
    )
    policy, same = build_policies("v2", min_scale=0.6)
    assert policy == same
    assert replace(policy, min_scale=0.2) == build_policies("v2")[0]
    generator = torch.Generator().manual_seed(3)
    boxes = [sample_view(policy, 1000, 1000, generator).box for _ in range(DRAWS)]
    assert fills([height * width / 1e6 for _, _, height, width in boxes], 0.6 - 0.002, 1.0, gap=0.05)


def test_the_two_views_of_v3_differ_in_blur_and_solarizing():
    views, image, draws = Views(build_policies("v3"), SIZE), noise(60, 50), 600
    query, key = zip(*(views.sample(image, seeded_generator(0, 0, i)) for i in range(draws)), strict=True)
    assert all(view.blur for view in query)
    assert not any(view.solarize for view in query)
    for operation, p in {"blur": 0.1, "solarize": 0.2}.items():
        count = sum(bool(getattr(view, operation)) for view in key)
        assert abs(count - draws * p) <= 4 * math.sqrt(draws * p * (1 - p)), operation
    solarized = next(i for i, view in enumerate(key) if view.solarize)
    rendered = views(image, seeded_generator(0, 0, solarized))
    assert rendered["pixel_values"].max() > 127 >= rendered["key_pixel_values"].max()


def test_one_view_is_the_first_of_two():
    policies, image = build_policies("v3"), noise(60, 50)
    one, two = (Views(policies[:count], SIZE)(image, seeded_generator(4)) for count in (1, 2))
    assert one.keys() == {"pixel_values"}
    assert torch.equal(one["pixel_values"], two["pixel_values"])


def test_a_pair_of_policies_can_be_registered_and_nothing_else(monkeypatch):
    monkeypatch.setattr("training.views.policy.POLICIES", {})
    pair = ViewPolicy(), ViewPolicy(solarize_p=0.2)
    register_policy("mine", pair)
    assert build_policies("mine") == pair
    assert build_policies("mine", min_scale=0.5)[1] == ViewPolicy(min_scale=0.5, solarize_p=0.2)
    register_policy("mine", pair)
    with pytest.raises(ValueError, match=r"augmentation \('mine'\) is registered already"):
        register_policy("mine", pair[::-1])
    for wrong in ((), pair[:1], (*pair, ViewPolicy()), list(pair), "v2"):
        with pytest.raises(
            ValueError, match=r"augmentation \('other'\) is given .*: give a ViewPolicy, or a tuple of two"
        ):
            register_policy("other", wrong)


def test_a_flip_mirrors_the_view_and_can_be_switched_off():
    # Dark on the left, bright on the right: mirrored views fall from left to right.
    ramp = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8)[:, None], (100, 1, 3)))
    falling = {}
    for flip in (True, False):
        view = Views(build_policies("crop", horizontal_flip=flip)[:1], SIZE)
        views = [view(ramp, seeded_generator(0, 0, i))["pixel_values"].float() for i in range(100)]
        falling[flip] = sum(bool(v[..., 0].mean() > v[..., -1].mean()) for v in views)
    assert 30 <= falling[True] <= 70  # 50 ± 4 sigma
    assert falling[False] == 0


def test_two_views_differ_and_depend_on_seed_epoch_and_index_alone():
    two_views, image = Views(build_policies("v2"), SIZE), noise(60, 50)

    def views(*key):
        return two_views(image, seeded_generator(*key))

    first, again = views(0, 3, 7), views(0, 3, 7)
    assert first["pixel_values"].shape == first["key_pixel_values"].shape == (3, SIZE, SIZE)
    assert first["pixel_values"].dtype == torch.uint8
    assert not torch.equal(first["pixel_values"], first["key_pixel_values"])
    assert all(torch.equal(first[name], again[name]) for name in first)
    for key in ((1, 3, 7), (0, 4, 7), (0, 3, 8), (0, 7, 3)):
        others = views(*key)
        assert not any(torch.equal(first[name], others[name]) for name in first), key


def test_the_two_views_of_a_pair_are_sampled_from_one_distribution():
    # Each view of a bright and a dark half is about as often brighter than the other.
    image = Image.fromarray(np.tile(np.repeat([0, 255], 50).astype(np.uint8)[:, None], (100, 1, 3)))
    two_views = Views(build_policies("v2"), 8)
    pairs = [two_views(image, seeded_generator(0, 0, i)) for i in range(400)]
    brighter = sum(bool(p["pixel_values"].float().mean() > p["key_pixel_values"].float().mean()) for p in pairs)
    assert 160 <= brighter <= 240  # 200 ± 4 sigma


@pytest.mark.parametrize(("resize", "size"), [(37, 32), (32, 32), (256, 224)])
def test_evaluation_view_equals_resize_and_centre_crop(resize, size):
    reference = T.Compose([T.Resize(resize), T.CenterCrop(size), T.PILToTensor()])
    view = EvaluationView(resize, size)
    for seed, (width, height) in enumerate(image_sizes(20)):
        image = noise(width, height, seed)
        assert torch.equal(view(image, seeded_generator(seed))["pixel_values"], reference(image)), (width, height)
