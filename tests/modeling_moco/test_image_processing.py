"""Both image processors against torchvision's own transform."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from transformers import AutoImageProcessor

from modeling_moco import MoCoConfig, MoCoImageProcessor, MoCoImageProcessorPil
from modeling_moco.image_processing_moco import normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKENDS = [MoCoImageProcessor, MoCoImageProcessorPil]
ONE_GREY_LEVEL = 1 / 255 / min(STD) + 1e-6


def oracle(resize=256, crop=224):
    return transforms.Compose(
        [transforms.Resize(resize), transforms.CenterCrop(crop), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )


def noise(rng, width, height):
    # Half noise, half gradient: a crop that is off by a pixel changes the noise, one that is off by many the gradient.
    ramp = np.linspace(0, 127, width)[None, :, None]
    return Image.fromarray((rng.integers(0, 128, (height, width, 3)) + ramp).astype(np.uint8))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sizes = [(256, 256), (257, 300), (301, 256), (500, 375), (40, 33), *rng.integers(60, 420, (35, 2)).tolist()]
    return [noise(rng, width, height) for width, height in sizes]


@pytest.mark.parametrize(
    ("backend", "tolerance"), [(MoCoImageProcessorPil, 1e-6), (MoCoImageProcessor, ONE_GREY_LEVEL)]
)
def test_processor_equals_the_torchvision_transform(images, backend, tolerance):
    processor, transform = backend(), oracle()
    for image in images:
        pixels = processor(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(pixels[0], transform(image), atol=tolerance, rtol=0, msg=f"size {image.size}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_image_of_another_mode_equals_its_rgb_conversion(images, backend, mode):
    image = images[0].convert(mode)  # an opaque alpha channel: nothing to compose
    pixels = backend()(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels[0], oracle()(image.convert("RGB")), atol=ONE_GREY_LEVEL, rtol=0)


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_settings_survive_saving_and_loading(tmp_path, images, backend):
    original = MoCoImageProcessor(
        size={"shortest_edge": 40},
        crop_size={"height": 30, "width": 34},
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
    )
    original.save_pretrained(tmp_path)
    MoCoConfig().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is {"torchvision": MoCoImageProcessor, "pil": MoCoImageProcessorPil}[backend]
    for name in ("size", "crop_size", "image_mean", "image_std", "resample", "default_to_square"):
        assert getattr(loaded, name) == getattr(original, name), name
    loaded, original = (processor(images[3], return_tensors="pt").pixel_values for processor in (loaded, original))
    assert loaded.shape == (1, 3, 30, 34)
    torch.testing.assert_close(loaded, original, atol=1 / 255 / 0.4 + 1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cifar_sized_images_are_only_normalised(backend):
    processor = backend(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = noise(np.random.default_rng(0), 32, 32)
    pixels = processor(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels[0], oracle(32, 32)(image), atol=1e-6, rtol=0)


def test_normalize_equals_to_tensor_and_normalize(images):
    views = [image.resize((20, 16)) for image in images[:3]]
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    batch = torch.stack([transforms.PILToTensor()(view) for view in views])
    before = batch.clone()
    normalised = normalize(batch, MEAN, STD)
    torch.testing.assert_close(normalised, torch.stack([reference(view) for view in views]), atol=1e-6, rtol=0)
    assert normalised.dtype == torch.float32
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, before)
