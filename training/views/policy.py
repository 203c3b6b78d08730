"""The random parameters of a view: their published distributions, and how they are sampled."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from .scaled import Encoded

ASPECT_RATIO = (3 / 4, 4 / 3)
BLUR_SIGMA = (0.1, 2.0)  # pixels
VIEWS = ("pixel_values", "key_pixel_values")  # names of the query view and of the key view in a batch


@dataclass(frozen=True)
class ViewPolicy:
    """Distribution of one random view.

    Args:
        min_scale: smallest area of the crop, as a fraction of the image; the largest is 1.
        jitter: strength of brightness, contrast, saturation (factor in 1 ± strength) and hue (shift in ± strength turns).
        jitter_p, gray_p, blur_p, solarize_p, flip_p: probability of each operation. Solarizing turns levels from 128 on into
            those of a negative, as PIL.ImageOps does.
        gray_first: whether grayscale comes before the colour jitter (v1) or after it.
    """

    min_scale: float = 0.2
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    flip_p: float = 0.5
    gray_first: bool = False
    solarize_p: float = 0.0


Policies = tuple[ViewPolicy, ...]  # of the query view and of the key view; of one view alone, for a memory bank

_V3 = ViewPolicy(min_scale=0.08, jitter=(0.4, 0.4, 0.2, 0.1), blur_p=1.0)

# A pair has a policy for each of the two views.
POLICIES: dict[str, ViewPolicy | tuple[ViewPolicy, ViewPolicy]] = {
    # arXiv:1911.05722, section 3.3 and the official main_moco.py without --aug-plus
    "v1": ViewPolicy(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_first=True),
    # arXiv:2003.04297 and --aug-plus
    "v2": ViewPolicy(blur_p=0.5),
    # official CIFAR-10 notebook
    "cifar": ViewPolicy(min_scale=0.08),
    # training view of the linear protocol: crop and flip (official main_lincls.py)
    "crop": ViewPolicy(min_scale=0.08, jitter_p=0.0, gray_p=0.0),
    # arXiv:2104.02057 and the official main_moco.py of moco-v3, for ViT; its ResNet-50 has min_scale 0.2
    "v3": (_V3, replace(_V3, blur_p=0.1, solarize_p=0.2)),
    # arXiv:2002.05709, appendix A, and google-research/simclr, data_util.py, with color_jitter_strength 1.0. Its blur has 23
    # taps at 224 px and ours goes on until a Gaussian ends: on 60 photographs of 224 px, three sigmas each, pil differs from
    # those taps by 0.41 levels of 255 on average, cv2 by 0.22 and device by 0.21 (rounding alone makes up to 0.25). The
    # official blur pads with black, which darkens the outer 11 px: 0.85 levels on average. Ours repeats the edge.
    "simclr": ViewPolicy(min_scale=0.08, jitter=(0.8, 0.8, 0.8, 0.2), blur_p=0.5),
    # the same without blur and with strength 0.5, for CIFAR-10: the numbers of the MoCo notebook
    "simclr_cifar": ViewPolicy(min_scale=0.08),
}


def register_policy(name: str, policy: ViewPolicy | tuple[ViewPolicy, ViewPolicy]) -> None:
    """Make a policy known as a value of `augmentation`, in recipes and flags of this process.

    Args:
        name: that it is to have.
        policy: of both views, or a pair: that of the query view and that of the key view.

    Raises:
        ValueError: the name has another policy, or this is neither a policy nor a pair.
    """
    if not all(isinstance(one, ViewPolicy) for one in _both(policy)) or len(_both(policy)) != 2:
        raise ValueError(f"augmentation ({name!r}) is given {policy!r}: give a ViewPolicy, or a tuple of two")
    if POLICIES.setdefault(name, policy) != policy:
        raise ValueError(f"augmentation ({name!r}) is registered already, as {POLICIES[name]}: choose another name")


def _both(policy: ViewPolicy | tuple[ViewPolicy, ViewPolicy]) -> tuple[ViewPolicy, ViewPolicy]:
    return policy if isinstance(policy, tuple) else (policy, policy)


def build_policies(
    name: str, horizontal_flip: bool = True, min_scale: float | None = None
) -> tuple[ViewPolicy, ViewPolicy]:
    """The policies of the query view and of the key view that `name` has in `POLICIES`, with changes.

    Args:
        horizontal_flip: false turns flips off, for images whose mirror image has another meaning.
        min_scale: replaces the policies' own; None keeps it.

    Raises:
        ValueError: no policy has this name.
    """
    if name not in POLICIES:
        raise ValueError(
            f"augmentation ({name!r}) is unknown: choose one of {', '.join(POLICIES)}, or call register_policy first"
        )
    query, key = (
        replace(
            policy,
            flip_p=policy.flip_p if horizontal_flip else 0.0,
            min_scale=policy.min_scale if min_scale is None else min_scale,
        )
        for policy in _both(POLICIES[name])
    )
    return query, key


@dataclass(frozen=True)
class ViewParams:
    """The sampled parameters of one view.

    Args:
        box: top, left, height and width of the crop in pixels.
        jitter: colour operations in order, as (name, factor); empty without jitter.
        gray: whether the view is turned to grayscale.
        blur: standard deviation of the blur in pixels; 0 without blur.
        flip: whether the view is mirrored.
        solarize: whether levels from 128 on become those of a negative.
    """

    box: tuple[int, int, int, int]
    jitter: tuple[tuple[str, float], ...]
    gray: bool
    blur: float
    flip: bool
    solarize: bool = False


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return torch.empty(1).uniform_(low, high, generator=generator).item()


def _happens(p: float, generator: torch.Generator) -> bool:
    # Probabilities 0 and 1 consume no random number, as a transform outside RandomApply consumes none.
    return p > 0 and (p == 1 or torch.rand(1, generator=generator).item() < p)


def centred_box(width: int, height: int) -> tuple[int, int, int, int]:
    """The largest centred box with an allowed aspect ratio (top, left, height, width): used where no sampled box fits."""
    w = min(width, round(height * ASPECT_RATIO[1]))
    h = min(height, round(width / ASPECT_RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _sample_box(width: int, height: int, min_scale: float, generator: torch.Generator) -> tuple[int, int, int, int]:
    area = height * width
    log_ratio = torch.log(torch.tensor(ASPECT_RATIO)).tolist()
    for _ in range(10):
        target_area = area * _uniform(min_scale, 1.0, generator)
        ratio = torch.exp(torch.empty(1).uniform_(*log_ratio, generator=generator)).item()
        w, h = round(math.sqrt(target_area * ratio)), round(math.sqrt(target_area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
            left = int(torch.randint(0, width - w + 1, (1,), generator=generator))
            return top, left, h, w
    return centred_box(width, height)


def _sample_jitter(policy: ViewPolicy, generator: torch.Generator) -> tuple[tuple[str, float], ...]:
    if not _happens(policy.jitter_p, generator):
        return ()
    order = torch.randperm(4, generator=generator).tolist()
    *strengths, hue = policy.jitter
    factors = [_uniform(1 - s, 1 + s, generator) for s in strengths] + [_uniform(-hue, hue, generator)]
    names = ("brightness", "contrast", "saturation", "hue")
    return tuple((names[i], factors[i]) for i in order)


def sample_view(policy: ViewPolicy, width: int, height: int, generator: torch.Generator) -> ViewParams:
    """Sample the parameters of one view of an image of `width` x `height` pixels."""
    box = _sample_box(width, height, policy.min_scale, generator)
    if policy.gray_first:
        gray = _happens(policy.gray_p, generator)
        jitter = _sample_jitter(policy, generator)
    else:
        jitter = _sample_jitter(policy, generator)
        gray = _happens(policy.gray_p, generator)
    blur = _uniform(*BLUR_SIGMA, generator) if _happens(policy.blur_p, generator) else 0.0
    solarize = _happens(policy.solarize_p, generator)
    return ViewParams(box, jitter, gray, blur, flip=_happens(policy.flip_p, generator), solarize=solarize)


def seeded_generator(*key: int) -> torch.Generator:
    """A generator that depends on all numbers of `key`, for example (seed, epoch, index), and on nothing else."""
    seed = np.random.SeedSequence(key).generate_state(1)[0]
    return torch.Generator().manual_seed(int(seed))


def image_size(image: Image.Image | Encoded | torch.Tensor) -> tuple[int, int]:
    """Width and height in pixels of a PIL image, of one that is not decoded yet, or of a tensor (3, H, W)."""
    return (image.shape[2], image.shape[1]) if isinstance(image, torch.Tensor) else image.size
