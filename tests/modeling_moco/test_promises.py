"""What transformers promises of every model: initialisation, loading in part, precisions, outputs, losses, checkpointing."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import BACKBONES, CHECKPOINTING, C, assert_equal, key_parts, moco_config, query_parts, views
from torch import nn
from torch.overrides import TorchFunctionMode

from modeling_moco import MoCoBackbone, MoCoForImageClassification, MoCoModel
from modeling_moco.distributed_moco import SplitBatchNorm2d

KINDS = [MoCoModel, MoCoForImageClassification, MoCoBackbone]
# With tokens, scales, tables and buffers that no other architecture has.
PECULIAR = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2, "init_values": 0.1, "reg_tokens": 2, "class_token": True},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2]},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def memory_of_nan():
    """New memory holds NaN, so that a tensor that nobody has initialised is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# Initialisation and loading in part


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("architecture", "model_args"), (BACKBONES | PECULIAR).items())
def test_every_tensor_that_a_checkpoint_lacks_starts_as_in_a_new_model(kind, architecture, model_args, memory_of_nan):
    config = moco_config(architecture, model_args=model_args)
    new, empty = kind(config), kind.from_pretrained(None, config=config, state_dict={})
    expected = {**dict(new.named_parameters()), **dict(new.named_buffers())}
    found = {**dict(empty.named_parameters()), **dict(empty.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        if len(tensor.unique()) <= 2 or not tensor.is_floating_point() or name not in new.state_dict():
            assert torch.equal(found[name], tensor), name
        else:
            assert found[name].isfinite().all(), name
            drawn_anew = not torch.equal(found[name], tensor)
            assert drawn_anew or name.endswith(("pos_embed", "dictionary.queue")), name
            if tensor.numel() > 1000:
                assert found[name].std().item() == pytest.approx(tensor.std().item(), rel=0.15), name
    if kind is MoCoModel:
        assert_equal(key_parts(empty), query_parts(empty, rename=True))


MISMATCHES = {
    "another stem": ("resnet18", {"stem": "small"}, "encoder_q.conv1.weight"),
    "another projection": ("test_resnet", {"projection_dim": 2 * C}, "projector_q.2.weight"),
    "another image size": ("test_vit", {"model_args": {"img_size": 64}}, "encoder_q.pos_embed"),
}


@pytest.mark.parametrize(("architecture", "changes", "name"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_tensor_of_another_shape_starts_anew_and_the_key_encoder_is_a_copy_again(
    architecture, changes, name, tmp_path, memory_of_nan
):
    saved = MoCoModel(moco_config(architecture))
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    saved.save_pretrained(tmp_path)
    model = MoCoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **changes).eval()
    assert model.get_parameter(name).shape != saved.get_parameter(name).shape
    assert_equal(key_parts(model), query_parts(model, rename=True))
    for other, tensor in query_parts(model).items():
        if tensor.shape == saved.state_dict()[other].shape:
            assert torch.equal(tensor, saved.state_dict()[other]), other
    outputs = model(*views(size=64))
    assert all(tensor.isfinite().all() for tensor in outputs.to_tuple())
    assert not any(
        parameter.requires_grad for part in (model.encoder_k, model.projector_k) for parameter in part.parameters()
    )


def test_a_projector_of_another_kind_is_reported(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    model, report = MoCoModel.from_pretrained(tmp_path, projection_head="linear", output_loading_info=True)
    missing = {f"projector_{part}.{name}" for part in "qk" for name in ("weight", "bias")}
    assert report["missing_keys"] == model.absent_keys == missing
    assert report["unexpected_keys"] == {
        f"projector_{part}.{i}.{name}" for part in "qk" for i in (0, 2) for name in ("weight", "bias")
    }
    assert_equal(key_parts(model), query_parts(model, rename=True))


def test_what_the_checkpoint_of_an_encoder_lacks_is_known_and_not_reported(trained, tmp_path):
    trained.save_pretrained(tmp_path / "whole")
    encoder = MoCoModel.from_pretrained(tmp_path / "whole", momentum_encoder=False)
    assert encoder.absent_keys == frozenset()
    encoder.save_pretrained(tmp_path / "encoder")
    model, report = MoCoModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not report["missing_keys"]
    assert model.absent_keys == {name for name in model.state_dict() if not name.startswith("encoder_q.")}


# BatchNorm


@pytest.mark.parametrize("mode", ["split", "sync", "shuffle"])
def test_batch_norm_of_contrastive_training_stays_there(mode, tmp_path):
    whole = MoCoModel(moco_config(batch_norm=mode, batch_norm_splits=4))
    special = {"split": SplitBatchNorm2d, "sync": nn.SyncBatchNorm, "shuffle": nn.BatchNorm2d}[mode]
    assert any(isinstance(module, special) for module in whole.modules())
    whole.save_pretrained(tmp_path)
    labels = torch.zeros(3, dtype=torch.long)
    for kind in (MoCoForImageClassification, MoCoBackbone):
        model = kind.from_pretrained(tmp_path).train()
        norms = {type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
        assert not {SplitBatchNorm2d, nn.SyncBatchNorm} & norms
        for n in (2, 3):  # an incomplete batch, as the last of an epoch may be
            inputs = {"pixel_values": views(n)[0]} | ({"labels": labels[:n]} if kind is not MoCoBackbone else {})
            outputs = model(**inputs)
            assert len(outputs.logits if kind is not MoCoBackbone else outputs.feature_maps[0]) == n
    encoder = MoCoModel.from_pretrained(tmp_path, momentum_encoder=False).train()
    assert len(encoder(views(3)[0]).pooler_output) == 3


# Outputs


@pytest.mark.parametrize("architecture", BACKBONES)
def test_hidden_states_are_the_maps_of_all_stages(architecture):
    images = views(2)[0]
    config = moco_config(architecture)
    model, classifier = MoCoModel(config).eval(), MoCoForImageClassification(config).eval()
    stages = len(model.encoder_q.feature_info)
    with torch.no_grad():
        plain, outputs = model(images), model(images, output_hidden_states=True)
        assert plain.hidden_states is None
        torch.testing.assert_close(outputs.last_hidden_state, plain.last_hidden_state)
        torch.testing.assert_close(outputs.pooler_output, plain.pooler_output)
        torch.testing.assert_close(
            outputs.hidden_states, tuple(model.encoder_q.forward_intermediates(images, intermediates_only=True))
        )
        assert len(outputs.hidden_states) >= stages
        labelled = classifier(images, output_hidden_states=True)
        torch.testing.assert_close(labelled.logits, classifier(images).logits)
        assert len(labelled.hidden_states) == len(outputs.hidden_states)
        classifier.config.output_hidden_states = True
        assert len(classifier(images).hidden_states) == len(outputs.hidden_states)


def test_a_backbone_returns_all_stages_on_request():
    backbone = MoCoBackbone(moco_config(out_indices=[1])).eval()
    images = views(2)[0]
    assert backbone(images).hidden_states is None
    outputs = backbone(images, output_hidden_states=True)
    assert len(outputs.feature_maps) == 1
    assert [state.shape[1] for state in outputs.hidden_states] == backbone.num_features


@pytest.mark.parametrize("kind", KINDS)
def test_attention_weights_are_refused_and_not_left_out(kind):
    with pytest.raises(ValueError, match="output_attentions"):
        kind(moco_config("test_vit"))(views(2)[0], output_attentions=True)


def test_a_contrastive_step_without_a_key_encoder_is_refused():
    encoder = MoCoModel(moco_config(), momentum_encoder=False)
    with pytest.raises(ValueError, match="momentum_encoder=True"):
        encoder(*views())


class Calls(TorchFunctionMode):
    """How often torch's fused attention is called."""

    def __init__(self):
        super().__init__()
        self.fused = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.fused += function is F.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_fused_or_written_out_as_asked_with_the_same_result(kind, tmp_path):
    kind(moco_config("test_vit")).save_pretrained(tmp_path)
    images, found = views(2)[0], {}
    for implementation in ("sdpa", "eager"):
        model = kind.from_pretrained(tmp_path, attn_implementation=implementation).eval()
        with torch.no_grad(), Calls() as calls:
            found[implementation] = model(images, return_dict=False)[0]
        assert (calls.fused > 0) == (implementation == "sdpa")
    torch.testing.assert_close(found["eager"], found["sdpa"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", BACKBONES)
def test_an_image_has_the_same_features_in_any_batch(architecture):
    model, images = MoCoModel(moco_config(architecture)).eval(), views(4)[0]
    with torch.no_grad():
        alone = torch.cat([model(image[None]).pooler_output for image in images])
        torch.testing.assert_close(model(images).pooler_output, alone, atol=1e-5, rtol=1e-4)
        assert torch.equal(model(images).pooler_output, model(images).pooler_output)


# Losses


def problem(kind, n):
    """Number of labels, labels, and the loss of logits in float64."""
    if kind == "single_label_classification":
        labels = torch.randint(5, (n,))
        return 5, labels, lambda x: sum(x[i].exp().sum().log() - x[i, labels[i]] for i in range(n)) / n
    if kind == "multi_label_classification":
        labels = torch.randint(2, (n, 5)).float()
        return 5, labels, lambda x: -(labels * x.sigmoid().log() + (1 - labels) * (-x).sigmoid().log()).mean()
    labels = torch.randn(n)
    return 1, labels, lambda x: ((x[:, 0] - labels) ** 2).mean()


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression"])
def test_the_loss_is_that_of_the_problem(kind, given):
    count, labels, by_hand = problem(kind, 6)
    config = moco_config(num_labels=count, problem_type=kind if given else None)
    model = MoCoForImageClassification(config)
    outputs = model(views(6)[0], labels=labels)
    assert outputs.loss.item() == pytest.approx(by_hand(outputs.logits.double()).item(), rel=1e-5)
    assert model.config.problem_type == kind
    outputs.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.classifier.parameters())


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_takes_a_contrastive_step_in_any_precision(trained, dtype, tmp_path):
    trained.save_pretrained(tmp_path)
    images = views()
    expected = trained(*images).loss.item()
    cast = {torch.float16: MoCoModel.half, torch.bfloat16: MoCoModel.bfloat16, torch.float64: MoCoModel.double}[dtype]
    for model in (
        cast(MoCoModel.from_pretrained(tmp_path)).eval(),
        MoCoModel.from_pretrained(tmp_path, dtype=dtype).eval(),
    ):
        model.update_key_encoder()
        outputs = model(*images)  # of float32, or of uint8, whatever the model's precision
        assert outputs.loss.item() == pytest.approx(expected, abs=0.3)
        outputs.loss.backward()
        model.dictionary.enqueue(outputs.key_embeds)
        gradient = next(model.encoder_q.parameters()).grad
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()
        assert model(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)).pooler_output.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_images_take_the_precision_of_the_model(kind):
    model = kind(moco_config()).bfloat16().eval()
    output = model(views(2)[0], return_dict=False)[0]
    assert (output[0] if kind is MoCoBackbone else output).dtype == torch.bfloat16


# Gradient checkpointing


def saved_for_backward(forward):
    """What a forward pass returns, and how many numbers it keeps for the backward pass."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return forward(), sum(sizes)


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("architecture", BACKBONES)
def test_gradient_checkpointing_keeps_less_and_has_the_same_gradients(architecture, contrastive):
    config = moco_config(architecture, num_labels=3)
    model = MoCoModel(config) if contrastive else MoCoForImageClassification(config)
    inputs = views() if contrastive else (views()[0], torch.arange(8) % 3)
    gradients, kept = [], []
    for enable in (False, True, False):
        getattr(model, f"{CHECKPOINTING}_{'enable' if enable else 'disable'}")()
        assert getattr(model, f"is_{CHECKPOINTING}") == enable
        model.zero_grad()
        loss, size = saved_for_backward(lambda: model(*inputs).loss)
        loss.backward()
        kept.append(size)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert kept[1] < 0.8 * kept[0]
    assert kept[2] == kept[0]
    for plain, checkpointed in zip(gradients[0], gradients[1], strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("test_resnet", {}),
        ("test_resnet", {"batch_norm": "split", "batch_norm_splits": 2}),
        ("test_resnet", {"batch_norm": "split", "batch_norm_splits": 2, "symmetric_loss": True}),
        ("mobilenetv3_small_050", {}),  # timm's own BatchNorm
        ("test_resnet", None),  # a classifier
    ],
)
def test_gradient_checkpointing_counts_every_image_once_in_the_statistics(architecture, config):
    steps, statistics = [views() for _ in range(3)], {False: [], True: []}
    for enable in (False, True):
        torch.manual_seed(3)
        if config is None:
            model = MoCoForImageClassification(moco_config(num_labels=3))
            inputs = [(images, torch.arange(8) % 3) for images, _ in steps]
        else:
            model, inputs = MoCoModel(moco_config(architecture, **config)), steps
        if enable:
            getattr(model, f"{CHECKPOINTING}_enable")()
        model.train()
        for x in inputs[:2]:
            model(*x).loss.backward()
            statistics[enable].append(of_batch_norm(model))
        if enable:  # the forward pass after the last backward pass counts too
            getattr(model, f"{CHECKPOINTING}_disable")()
        model(*inputs[2])
        statistics[enable].append(of_batch_norm(model))
    counts = {tensor.item() for name, tensor in statistics[False][-1].items() if name.endswith("num_batches_tracked")}
    assert counts == {6 if config and "symmetric_loss" in config else 3}
    for checkpointed, plain in zip(statistics[True], statistics[False], strict=True):
        assert_equal(checkpointed, plain)


def of_batch_norm(model):
    return {name: tensor.clone() for name, tensor in model.named_buffers() if "dictionary" not in name}


def test_gradient_checkpointing_that_timm_lacks_is_refused_in_one_line():
    model = MoCoModel(moco_config("dla46x_c"), momentum_encoder=False)
    with pytest.raises(ValueError, match=r"gradient_checkpointing \(True\) is not for dla46x_c"):
        getattr(model, f"{CHECKPOINTING}_enable")()


# Export


@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("architecture", ["test_resnet", pytest.param("test_vit", marks=pytest.mark.slow)])
def test_both_modes_are_exported(architecture, strict):
    model, images = MoCoModel(moco_config(architecture)).eval(), views()
    for inputs in (images[:1], images):
        program = torch.export.export(model, inputs, strict=strict)
        torch.testing.assert_close(
            program.module()(*inputs).to_tuple(), model(*inputs).to_tuple(), atol=1e-5, rtol=1e-4
        )


def test_a_pickled_model_computes_the_same(trained, tmp_path):
    torch.save(trained, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    images = views()
    assert math.isclose(again(*images).loss.item(), trained(*images).loss.item(), rel_tol=1e-6)
