"""Mutated images are decoded by both decoders or by none."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutations import AVIF, LONG, PICTURES, mutated_bytes

from training.data.decode import Decoder, decode_image, decode_tensor, is_an_image
from training.views.scaled import SCALES, Encoded


@pytest.mark.filterwarnings("ignore")  # PIL and torchvision warn of what they pass over
@settings(max_examples=LONG or 300)
@given(mutated_bytes(PICTURES) | st.binary(max_size=64))
@example(PICTURES[0].replace(b"\x01\x12\0\x03", b"\x01\x12\0\xe2"))  # an orientation of unknown type
def test_an_image_is_decoded_by_both_decoders_or_by_none(data):
    found = []
    for decode in (decode_image, decode_tensor):
        try:
            pixels = decode({"bytes": data, "path": None})
        except OSError as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append(torch.from_numpy(np.array(pixels)).permute(2, 0, 1) if decode is decode_image else pixels)
    unreadable = [isinstance(pixels, str) for pixels in found]
    assert unreadable[0] == unreadable[1], found
    if not unreadable[0]:
        assert found[0].shape == found[1].shape
        if data.startswith(b"\xff\xd8"):  # of damaged fax files libtiff leaves pixels as the memory was
            assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=LONG or 300)
@given(mutated_bytes(PICTURES), st.sampled_from(SCALES))
def test_an_image_is_decoded_at_every_scale_or_at_none(data, scale):
    sizes = []
    for decode in (lambda image: image.whole(), lambda image: image.scaled(scale).image):
        try:
            image = Decoder().encoded({"bytes": data, "path": None}, decode_image)
            encoded = isinstance(image, Encoded) and min(image.size) >= scale  # smaller ones are never scaled
            sizes.append((decode(image) if encoded else image).size)
        except OSError:
            sizes.append(None)
    whole, scaled = sizes
    assert (whole is None) == (scaled is None)
    if data.startswith(b"\xff\xd8") and whole is not None and min(whole) >= scale:
        assert scaled == tuple(-(-side // scale) for side in whole)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=LONG or 200)
@given(data=mutated_bytes(PICTURES))
@example(data=AVIF.replace(b"av1C\x81", b"av1C\0"))
@example(data=AVIF.replace(b"pitm", b"\0itm"))
def test_any_file_is_an_image_or_is_not(place, data):
    with place() as folder:
        (folder / "file").write_bytes(data)
        is_an_image(folder / "file")
