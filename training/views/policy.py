"""The random parameters of a view: their published distributions, and how they are sampled."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

ASPECT_RATIO = (3 / 4, 4 / 3)
BLUR_SIGMA = (0.1, 2.0)  # pixels


@dataclass(frozen=True)
class ViewPolicy:
    """Distribution of one random view.

    Args:
        min_scale: smallest area of the crop, as a fraction of the image; the largest is 1.
        jitter: strength of brightness, contrast, saturation (factor in 1 ± strength) and hue (shift in ± strength turns).
        jitter_p, gray_p, blur_p, flip_p: probability of each operation.
        gray_first: whether grayscale comes before the colour jitter (v1) or after it.
    """

    min_scale: float = 0.2
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    flip_p: float = 0.5
    gray_first: bool = False


POLICIES = {
    # arXiv:1911.05722, section 3.3 and the official main_moco.py without --aug-plus
    "v1": ViewPolicy(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_first=True),
    # arXiv:2003.04297 and --aug-plus
    "v2": ViewPolicy(blur_p=0.5),
    # official CIFAR-10 notebook
    "cifar": ViewPolicy(min_scale=0.08),
    # training view of the linear protocol: crop and flip (official main_lincls.py)
    "crop": ViewPolicy(min_scale=0.08, jitter_p=0.0, gray_p=0.0),
}


def register_policy(name: str, policy: ViewPolicy) -> None:
    """Make a policy known as a value of `augmentation`, in recipes and flags of this process.

    Raises:
        ValueError: the name has another policy.
    """
    if POLICIES.setdefault(name, policy) != policy:
        raise ValueError(f"augmentation ({name!r}) is registered already, as {POLICIES[name]}: choose another name")


def build_policy(name: str, horizontal_flip: bool = True, min_scale: float | None = None) -> ViewPolicy:
    """The policy called `name` in `POLICIES`, with changes.

    Args:
        horizontal_flip: false turns flips off, for images whose mirror image has another meaning.
        min_scale: replaces the policy's own; None keeps it.

    Raises:
        ValueError: no policy has this name.
    """
    if name not in POLICIES:
        raise ValueError(
            f"augmentation ({name!r}) is unknown: choose one of {', '.join(POLICIES)}, or call register_policy first"
        )
    policy = POLICIES[name]
    return replace(
        policy,
        flip_p=policy.flip_p if horizontal_flip else 0.0,
        min_scale=policy.min_scale if min_scale is None else min_scale,
    )


@dataclass(frozen=True)
class ViewParams:
    """The sampled parameters of one view.

    Args:
        box: top, left, height and width of the crop in pixels.
        jitter: colour operations in order, as (name, factor); empty without jitter.
        gray: whether the view is turned to grayscale.
        blur: standard deviation of the blur in pixels; 0 without blur.
        flip: whether the view is mirrored.
    """

    box: tuple[int, int, int, int]
    jitter: tuple[tuple[str, float], ...]
    gray: bool
    blur: float
    flip: bool


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
    return ViewParams(box, jitter, gray, blur, flip=_happens(policy.flip_p, generator))


def seeded_generator(*key: int) -> torch.Generator:
    """A generator that depends on all numbers of `key`, for example (seed, epoch, index), and on nothing else."""
    seed = np.random.SeedSequence(key).generate_state(1)[0]
    return torch.Generator().manual_seed(int(seed))


def image_size(image: Image.Image | torch.Tensor) -> tuple[int, int]:
    """Width and height in pixels of a PIL image or of a tensor (3, H, W)."""
    return (image.shape[2], image.shape[1]) if isinstance(image, torch.Tensor) else image.size
