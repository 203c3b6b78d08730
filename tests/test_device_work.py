"""A training step on a GPU gives it work and never waits for it, and asks for no float64, which Apple's do not have.

No GPU is needed: fake tensors have no values to read, and a mode of torch stands for a device without float64.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from host_float64 import NoFloat64
from tiny_trainer import build, image_rows
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from modeling_moco import MoCoConfig, MoCoModel, split_norm_moco
from modeling_moco.dictionary_moco import InfoNCE
from training.data.images import MapImages
from training.evaluation.knn import knn_accuracy
from training.evaluation.scores import likeliest, score
from training.optimization.lars import Lars
from training.trainer import contrast_statistics
from training.views.device import NUMBERS, DeviceViews, sample_views
from training.views.pil import EvaluationView
from training.views.policy import POLICIES, build_policies

BATCH, SIZE = 16, 32


@pytest.fixture
def gpu():
    """Tensors without values, as a GPU's are to a host that does not wait; autocast to bfloat16 as `torch.autocast` sets it."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_autocast_enabled("cuda", True)  # `torch.autocast` refuses where there is no GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        yield torch.device("cuda")
    torch.clear_autocast_cache()
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", dtype)


def crops(device: torch.device) -> dict[str, torch.Tensor]:
    views = torch.zeros(2, BATCH, SIZE, SIZE, 3, dtype=torch.uint8, device=device)
    return {
        "pixel_values": views[0],
        "key_pixel_values": views[1],
        "numbers": torch.rand(BATCH, 2, NUMBERS, device=device),
    }


def small_images(device: torch.device) -> dict[str, torch.Tensor]:
    boxes, numbers = sample_views(build_policies("v2"), 40, 40, seed=0, epoch=0, indices=np.arange(BATCH))
    images = torch.zeros(BATCH, 3, 40, 40, dtype=torch.uint8, device=device)
    return {"images": images, "boxes": boxes.to(device), "numbers": numbers.to(device)}


@pytest.mark.parametrize("batch", [crops, small_images])
@pytest.mark.parametrize("policy", POLICIES)
def test_views_are_made_without_a_read_by_the_host(batch, policy, gpu):
    for views in DeviceViews(build_policies(policy), SIZE)(batch(gpu)).values():
        assert (views.shape, views.dtype, views.device.type) == ((BATCH, 3, SIZE, SIZE), torch.uint8, "cuda")


class Context(SimpleNamespace):
    """What autograd hands to a function, here kept for a backward that is called by hand: autograd's own wants a GPU."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
@pytest.mark.parametrize("batch_norm", ["plain", "split"])
def test_a_step_is_made_without_a_read_by_the_host(batch_norm, symmetric, gpu, monkeypatch):
    monkeypatch.setattr(split_norm_moco, "triton", None)  # its kernels want a driver, and read nothing
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # fake tensors have no memory to pin
    config = MoCoConfig(architecture="test_resnet", queue_size=64, batch_norm=batch_norm, symmetric_loss=symmetric)
    with gpu:
        model = MoCoModel(config).train()
    views = DeviceViews(build_policies("v2"), SIZE)(crops(gpu))
    model.update_key_encoder()
    outputs = model(**views)
    assert outputs.loss.requires_grad
    assert model.encoder_q(model.normalize(views["pixel_values"])).dtype == torch.bfloat16
    contrast_statistics(outputs.logits, outputs.query_embeds[:BATCH], config.temperature)
    with torch.no_grad():
        context, q = Context(), outputs.query_embeds
        loss, _ = InfoNCE.forward(context, q, torch.zeros_like(q), model.dictionary.queue, config.temperature)
        gradient, *_ = InfoNCE.backward(context, loss, None)
    assert gradient.shape == q.shape
    model.dictionary.enqueue(outputs.key_embeds)
    with pytest.raises(DataDependentOutputException):  # which a read is
        int(model.dictionary.queue_ptr)


@pytest.mark.parametrize("memory", [False, True])
def test_a_run_and_its_monitor_ask_the_device_for_no_float64(memory, tmp_path):
    rows = image_rows()
    trainer = build(rows, tmp_path, memory=memory, eval_strategy="epoch", knn_k=[3], num_train_epochs=2)
    trainer.monitor.bank = trainer.monitor.queries = MapImages(rows, EvaluationView(24, 24))
    with NoFloat64():
        trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"contrast_top1", "uniformity", "eval_rankme", "eval_knn_top1", "eval_leaks"} <= logged


def _step_by_lars(classic: bool, device: torch.device | str) -> torch.Tensor:
    weights = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in ((3, 2), (4, 3, 3, 3), (5,))]
    optimizer = Lars(weights, lr=0.1, weight_decay=1e-4, classic=classic)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weights[0]


@pytest.mark.parametrize("classic", [False, True])
def test_a_step_by_lars_is_made_without_a_read_by_the_host(classic, gpu):
    assert _step_by_lars(classic, gpu).device.type == "cuda"


@pytest.mark.parametrize("classic", [False, True])
def test_lars_asks_the_device_for_no_float64(classic):
    with NoFloat64():
        assert _step_by_lars(classic, "cpu").isfinite().all()


def test_scores_ask_the_device_for_no_float64():
    logits, labels = torch.randn(20, 6), torch.randint(6, (20,))
    with NoFloat64():
        assert 0 <= score(likeliest(logits), labels, 6).top1 <= 100
        assert 0 <= knn_accuracy(logits, labels, logits, labels, knn_k=[3])[3] <= 100


@pytest.mark.parametrize("make", [torch.Tensor.double, lambda x: torch.zeros(3, dtype=torch.float64)])
def test_the_stand_in_for_a_device_without_float64_refuses_it(make):
    x = torch.randn(3)
    with NoFloat64():
        assert x.cpu().double().sum().dtype == torch.float64
        with pytest.raises(TypeError, match="float64 tensor on the accelerator"):
            make(x)
