"""A training step and inference against recorded ones of detectron2 (tests/support/detectron2_step.py says how recorded).

A step has thousands of ReLUs and a few decisions of non-maximum suppression, which depend on the rounding of float32. On the
machine of the record, the gradients differ by 3e-6 of the largest of a tensor. Where convolutions add in another order, an
activation that is 0 within rounding falls on the other side: the losses stay, and gradients move.
"""

import contextlib

import pytest
import torch
from detectron2_step import ExactSums, Step

from modeling_moco import MoCoDetectionImageProcessor

KERNELS = {"of this machine": contextlib.nullcontext, "exact": ExactSums}
# With these, torch's convolutions add up as they did for the record, but for the width of a vector.
LIKE_THE_RECORD = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.fixture(scope="module", params=[False, True], ids=["boxes", "boxes and masks"])
def step(request):
    return Step(request.param)


@pytest.fixture(scope="module")
def inputs(step):
    processor = MoCoDetectionImageProcessor(do_resize=False, return_segmentation_masks=step.masks)
    inputs = processor(step.images, step.annotations(), return_tensors="pt")
    pixels = step.pixel_values()
    torch.testing.assert_close(inputs["pixel_values"], pixels, atol=1e-6, rtol=0)
    return inputs | {"pixel_values": pixels}  # the last bits decide on which side of 0 some activations lie


def trained(step, inputs, kernel):
    """Our model after the recorded step, and its losses."""
    model = step.model().train()
    torch.manual_seed(step.seed)
    with kernel():
        outputs = model(**inputs)
        outputs.loss.backward()
    return model, outputs


def gradient_error(step, model) -> float:
    """Of all gradients together: the norm of the difference by the norm."""
    expected, ours = step.part("grad."), dict(model.named_parameters())
    assert expected.keys() == ours.keys()
    differences = torch.stack([(ours[name].grad - grad).norm() for name, grad in expected.items()])
    for name, grad in expected.items():  # no tensor is only small beside the others
        assert (ours[name].grad - grad).norm() < 0.15 * grad.norm(), name
    return (differences.norm() / torch.stack([grad.norm() for grad in expected.values()]).norm()).item()


@pytest.mark.parametrize("kernel", KERNELS)
def test_losses_gradients_and_statistics_are_detectron2s(step, inputs, kernel):
    exact = kernel == "exact"
    if not exact and not LIKE_THE_RECORD:
        pytest.skip("the convolutions of this machine decide otherwise at a tie")
    model, outputs = trained(step, inputs, KERNELS[kernel])
    recorded = step.part("loss.")
    assert outputs.loss_dict.keys() == recorded.keys()
    losses = {name: (outputs.loss_dict[name] - loss).abs().item() for name, loss in recorded.items()}
    statistics = max((model.state_dict()[n] - t).abs().max().item() for n, t in step.part("after.").items())
    gradients = gradient_error(step, model)
    print(f"losses {losses}\nstatistics {statistics:.1e}, gradients {gradients:.1e}")
    assert max(losses.values()) < (1e-5 if exact else 1e-6)
    assert statistics < (2e-5 if exact else 2e-6)
    assert gradients < (0.03 if exact else 5e-4)
    torch.testing.assert_close(outputs.loss, sum(recorded.values()), atol=1e-5, rtol=0)


def test_detections_are_detectron2s(step, inputs):
    with torch.no_grad():
        outputs = step.model().eval()(inputs["pixel_values"], inputs["pixel_mask"])
    found = MoCoDetectionImageProcessor().post_process_object_detection(outputs, 0, step.sizes)
    for i, ours in enumerate(found):
        expected = {name: step.tensors[f"{name}_{i}"] for name in ("scores", "labels", "boxes")}
        print({name: (ours[name] - expected[name]).abs().max().item() for name in expected})
        assert torch.equal(ours["labels"], expected["labels"])
        torch.testing.assert_close(ours["scores"], expected["scores"], atol=2e-6, rtol=0)
        torch.testing.assert_close(ours["boxes"], expected["boxes"], atol=1e-3, rtol=0)
    if step.masks:
        found = MoCoDetectionImageProcessor().post_process_instance_segmentation(outputs, 0, step.sizes)
        for i, ours in enumerate(found):
            expected = step.tensors[f"masks_{i}"].bool()
            assert expected.any(dim=(1, 2)).all()
            assert (ours["masks"] != expected).sum() <= 3  # pixels whose probability is a half within rounding
