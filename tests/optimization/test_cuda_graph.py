"""A step that is replayed as a CUDA graph. The comparison needs a GPU of NVIDIA; what surrounds it does not."""

import pytest
import torch
from tiny_trainer import build, image_rows

from modeling_moco import MoCoConfig, MoCoModel
from training.benchmarks.step.variants import this_project
from training.views.policy import seeded_generator

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of NVIDIA is visible")


def model(**settings) -> MoCoModel:
    torch.manual_seed(0)
    defaults = {"architecture": "test_resnet", "queue_size": 64, "batch_norm": "split", "batch_norm_splits": 2}
    return MoCoModel(MoCoConfig(**defaults | settings)).train()


@needs_gpu
@pytest.mark.parametrize("settings", [{}, {"symmetric_loss": True}, {"batch_norm": "plain"}, {"dictionary": "batch"}])
def test_replayed_steps_are_those_of_the_step_itself(settings):
    views = torch.randint(256, (2, 16, 3, 32, 32), dtype=torch.uint8, generator=seeded_generator(1)).cuda()
    found = []
    for graph in (False, True):
        trained = model(**settings).cuda()
        step, losses = this_project(trained, views, "bf16", compiled=False, graph=graph), []
        for number in range(8):
            trained.shuffle_generator = seeded_generator(number)
            losses.append(step())
        found.append((torch.stack(losses), trained.state_dict()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][0].unique().numel() == 8
    for name, tensor in found[0][1].items():
        assert torch.equal(tensor, found[1][1][name]), name


def test_given_orders_are_those_in_which_keys_are_encoded():
    """As the generator would have drawn them: a replayed step gets its orders so."""
    views = torch.randint(256, (2, 8, 3, 32, 32), dtype=torch.uint8, generator=seeded_generator(1))
    losses = []
    for given in (False, True):
        drawing = model(symmetric_loss=True)
        drawing.shuffle_generator = seeded_generator(3)
        if given:
            orders = [drawing.random_order(8) for _ in range(2)]
            drawing.given_orders = iter(orders)
            drawing.shuffle_generator = seeded_generator(4)
        losses.append(drawing(*views).loss)
    other = model(symmetric_loss=True)
    other.shuffle_generator = seeded_generator(4)
    assert losses[0] == losses[1]
    assert losses[0] != other(*views).loss


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it has an effect")
def test_without_a_gpu_the_flag_says_that_it_has_no_effect_and_changes_nothing(tmp_path, caplog):
    losses = []
    for flag in (False, True):
        trainer = build(image_rows(), tmp_path / str(flag), memory=True, cuda_graph=flag, max_steps=6, logging_steps=1)
        with caplog.at_level("INFO"):
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert ("cuda_graph is without effect: it is for a GPU of NVIDIA, and this is cpu" in caplog.text) == flag
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
