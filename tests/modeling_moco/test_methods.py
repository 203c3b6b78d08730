"""The losses of the methods against loops over single numbers in float64, and what their settings mean together."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS, method_config
from tiny_models import assert_equal

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.dictionary_moco import (
    BankDictionary,
    BatchDictionary,
    BothViewsDictionary,
    QueueDictionary,
    negatives,
)
from modeling_moco.encoder_moco import build_predictor, build_projector, fixed_positions

N, C, T = 6, 5, 0.2


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def similarity(a, b):
    return sum(a[c] * b[c] for c in range(len(a)))


def naive(queries, positives, negatives_of):
    """InfoNCE by its definition, one number at a time."""
    total = 0.0
    for i in range(len(queries)):
        positive = torch.exp(similarity(queries[i], positives[i]) / T)
        others = sum(torch.exp(similarity(queries[i], other) / T) for other in negatives_of(i))
        total = total - torch.log(positive / (positive + others))
    return total / len(queries)


def compare(ours, theirs, *inputs):
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    pairs = [torch.autograd.grad(3 * loss, inputs, retain_graph=True) for loss in (ours, theirs)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("views", [1, 2])
def test_of_a_batch_the_other_images_keys_are_the_negatives_and_have_gradients(views):
    q, keys = unit(views, N, C).requires_grad_(), unit(views, N, C).requires_grad_()
    loss, logits = BatchDictionary()(q, keys, T)
    each = [naive(q[v], keys[v], lambda i, v=v: [keys[v][j] for j in range(N) if j != i]) for v in range(views)]
    compare(loss, sum(each) / views, q, keys)
    assert logits.shape == (views * N, 1 + N)
    assert not logits.requires_grad
    torch.testing.assert_close(logits[:, 0], (q * keys).sum(dim=2).flatten() / T)


def test_twice_t_times_both_losses_is_the_cross_entropy_of_moco_v3():
    q, keys = unit(2, N, C).requires_grad_(), unit(2, N, C).requires_grad_()

    def contrastive(q, k):  # arXiv:2104.02057, algorithm 1
        return 2 * T * F.cross_entropy(q @ k.T / T, torch.arange(N))

    loss, _ = BatchDictionary()(q, keys, T)
    compare(2 * T * 2 * loss, contrastive(q[0], keys[0]) + contrastive(q[1], keys[1]), q, keys)


def test_both_views_of_the_batch_make_nt_xent():
    z = torch.randn(2, N, C, dtype=torch.float64).requires_grad_()
    q = F.normalize(z, dim=2)
    loss, logits = BothViewsDictionary()(q, q.flip(0), T)
    every = torch.cat([q[0], q[1]])
    partner = torch.cat([q[1], q[0]])
    others = naive(every, partner, lambda i: [every[j] for j in range(2 * N) if j not in (i, (i + N) % (2 * N))])
    compare(loss, others, z)
    assert logits.isinf().sum(dim=1).tolist() == [2] * (2 * N)  # its own keys of both views


def test_nt_xent_is_that_of_an_independent_implementation():
    record = json.loads((Path(__file__).parents[1] / "records/nt_xent_lightly.json").read_text())
    z = torch.tensor(record["projections"], dtype=torch.float64).requires_grad_()
    q = F.normalize(z, dim=2)
    loss, _ = BothViewsDictionary()(q, q.flip(0), record["temperature"])
    assert loss.item() == pytest.approx(record["loss"], abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient, torch.tensor(record["gradient"], dtype=torch.float64), atol=1e-12, rtol=0)


def bank_of(images: int, size: int) -> BankDictionary:
    bank = BankDictionary(C, images, size, 0.5)
    bank.generator = torch.Generator().manual_seed(5)
    return bank.double()


def test_a_bank_draws_its_negatives_once_for_the_batch_and_has_the_image_itself_among_them():
    bank, q = bank_of(8, 7), unit(1, N, C).requires_grad_()
    index = torch.tensor([3, 7, 3, 0, 6, 5])
    drawn = torch.randint(8, (7,), generator=torch.Generator().manual_seed(5))
    loss, logits = bank(q, q, T, index)
    compare(loss, naive(q[0], bank.bank[index], lambda i: [bank.bank[j] for j in drawn]), q)
    assert logits.shape == (N, 8)
    assert set(index.tolist()) & set(drawn.tolist())
    again, _ = bank(q, q, T, index)
    assert again != loss  # the next batch draws others


def test_a_key_of_a_bank_moves_by_half_and_of_an_image_that_is_there_twice_the_last_one_counts():
    bank, keys, index = bank_of(40, 7), unit(N, C), torch.tensor([3, 9, 3, 0, 39, 12])
    before = bank.bank.clone()
    bank.enqueue(keys, index)
    expected = before.clone()
    for i, row in enumerate(index.tolist()):
        moved = [0.5 * before[row, c].item() + 0.5 * keys[i, c].item() for c in range(C)]
        length = math.sqrt(sum(x * x for x in moved))
        expected[row] = torch.tensor([x / length for x in moved], dtype=torch.float64)
    torch.testing.assert_close(bank.bank, expected, atol=1e-12, rtol=0)
    bank.store(keys, index, momentum=0)
    torch.testing.assert_close(bank.bank[9], keys[1])


@pytest.mark.parametrize("method", METHODS)
def test_keys_that_are_all_alike_cost_the_logarithm_of_their_number(method):
    config = method_config(method)
    model = MoCoModel(config).train()
    same = F.normalize(torch.ones(16), dim=0)
    model._queries = lambda pooled: same.expand(len(pooled), -1)
    model.encode_keys = lambda x: same.expand(len(x), -1)
    for name, buffer in model.dictionary.named_buffers():
        if name in ("queue", "bank"):
            buffer.copy_((same if name == "bank" else same[:, None]).expand_as(buffer))
    loss = step_of(model, torch.randn(2, 4, 3, 32, 32)).loss.item()
    views = 2 if config.symmetric_loss else 1
    assert loss == pytest.approx(config.loss_scale * views * math.log(1 + negatives(config, 4)), rel=1e-5)


def step_of(model, x, **kwargs):
    if model.config.dictionary == "bank":
        return model(x[0], index=torch.arange(len(x[0])), **kwargs)
    return model(x[0], x[1], **kwargs)


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("method", METHODS)
def test_hidden_states_of_a_step_are_the_maps_of_the_first_view(method, architecture):
    config = method_config(
        method, architecture=architecture, model_args={"img_size": 32} if architecture == "test_vit" else None
    )
    model, x = MoCoModel(config).eval(), torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        expected = tuple(model.encoder_q.forward_intermediates(x[0], intermediates_only=True))
        assert step_of(model, x).hidden_states is None
        outputs = step_of(model, x, output_hidden_states=True)
        torch.testing.assert_close(outputs.hidden_states, expected)
        assert step_of(model, x, output_hidden_states=True, return_dict=False)[-1] is not None
        model.config.output_hidden_states = True
        torch.testing.assert_close(step_of(model, x).hidden_states, expected)


@pytest.mark.parametrize("method", METHODS)
def test_hidden_states_change_nothing_else_of_a_step(method):
    torch.manual_seed(1)
    plain = MoCoModel(method_config(method)).train()
    asked, x = copy.deepcopy(plain), torch.randn(2, 4, 3, 32, 32)
    found = []
    for model, hidden in ((plain, False), (asked, True)):
        model.dictionary.generator = torch.Generator().manual_seed(5)  # a bank draws its negatives
        outputs = step_of(model, x, output_hidden_states=hidden)
        outputs.loss.backward()
        found.append(outputs)
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name
    assert_equal(asked.state_dict(), plain.state_dict())  # each image is counted once in the statistics of BatchNorm
    for parameter, other in zip(asked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=0, rtol=0)


def test_the_gradient_of_the_loss_reaches_the_hidden_states():
    model, x = MoCoModel(method_config("queue")).train(), torch.randn(2, 4, 3, 32, 32)
    outputs = model(*x, output_hidden_states=True)
    for maps in outputs.hidden_states:
        maps.retain_grad()
    outputs.loss.backward()
    # By hand: the head on the last map, as a leaf.
    last = outputs.hidden_states[-1].detach().requires_grad_()
    q = F.normalize(model.projector_q(last.mean(dim=(2, 3))), dim=1)
    logits = torch.cat([(q * outputs.key_embeds).sum(dim=1, keepdim=True), q @ model.dictionary.queue], dim=1)
    F.cross_entropy(logits / model.config.temperature, torch.zeros(4, dtype=torch.long)).backward()
    torch.testing.assert_close(outputs.hidden_states[-1].grad, last.grad)
    assert all(maps.grad.abs().sum() > 0 for maps in outputs.hidden_states)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_each_method_trains_all_that_it_has_and_is_the_same_after_loading(method, tmp_path):
    model = MoCoModel(method_config(method)).train()
    x = torch.randn(2, 8, 3, 32, 32)
    model.dictionary.generator = torch.Generator().manual_seed(3)
    model.update_key_encoder(0.9)
    outputs = step_of(model, x)
    views = 2 if model.config.symmetric_loss else 1
    assert outputs.query_embeds.shape == outputs.key_embeds.shape == (views * 8, 16)
    assert outputs.logits.shape == (views * 8, 1 + outputs.logits.isinf().sum(dim=1).max() + negatives(model.config, 8))
    outputs.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert any(name.startswith("encoder_k.") for name, _ in model.named_parameters()) == model.has_key_encoder
    model.dictionary.enqueue(outputs.key_embeds, outputs.key_index)
    model.save_pretrained(tmp_path)
    loaded = MoCoModel.from_pretrained(tmp_path).train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    losses = []
    for one in (model, loaded):
        one.dictionary.generator = torch.Generator().manual_seed(4)
        one.shuffle_generator = torch.Generator().manual_seed(4)
        losses.append(step_of(one, x).loss)
    torch.testing.assert_close(
        *losses, atol=1e-6, rtol=0
    )  # loaded weights lie elsewhere in memory, and sum in another order


def test_the_queries_of_simclr_are_normalised_together_over_both_views():
    model = MoCoModel(method_config("simclr")).train()
    x = torch.randn(2, 4, 3, 32, 32)
    seen = []
    model.encoder_q.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    forward_features = model.encoder_q.forward_features
    model.encoder_q.forward_features = lambda x: seen.append(len(x)) or forward_features(x)
    model(x[0], x[1])
    assert seen == [8]


def test_keys_of_a_shared_encoder_have_gradients_and_those_of_a_moving_average_have_none():
    x = torch.randn(4, 3, 32, 32)
    assert MoCoModel(method_config("end_to_end")).encode_keys(x).requires_grad
    assert not MoCoModel(method_config("moco_v3")).encode_keys(x).requires_grad


def test_the_predictor_is_for_queries_alone_and_has_no_moving_average():
    model = MoCoModel(method_config("moco_v3")).eval()
    x = torch.randn(4, 3, 32, 32)
    before = model.encode_keys(x)
    torch.nn.init.normal_(model.predictor_q[0].weight)
    model.update_key_encoder(0.5)
    assert torch.equal(before, model.encode_keys(x))
    assert not any("predictor_k" in name for name in model.state_dict())


# The layers of the official heads: (inputs, outputs, bias) of a Linear, (width, scale, shift) of a BatchNorm.
HEADS = {
    ("mlp_bn", 2): [(32, 64, False), (64, True, True), (64, 8, False), (8, False, False)],
    ("mlp_bn", 3): [
        (32, 64, False),
        (64, True, True),
        (64, 64, False),
        (64, True, True),
        (64, 8, False),
        (8, False, False),
    ],
    ("simclr", 2): [(32, 64, False), (64, True, True), (64, 8, False), (8, True, False)],
    ("mlp", 3): [(32, 64, True), (64, 64, True), (64, 8, True)],
}


def layers_of(head):
    for layer in head:
        if isinstance(layer, torch.nn.Linear):
            yield layer.in_features, layer.out_features, layer.bias is not None
        elif isinstance(layer, torch.nn.BatchNorm1d):
            yield layer.num_features, layer.weight is not None, layer.bias is not None


@pytest.mark.parametrize(("kind", "layers"), HEADS)
def test_heads_have_the_published_layers(kind, layers):
    config = MoCoConfig(projection_head=kind, projection_layers=layers, projection_hidden_dim=64, projection_dim=8)
    assert list(layers_of(build_projector(config, 32))) == HEADS[kind, layers]


def test_the_predictors_of_moco_v3_differ_in_their_last_batch_norm():
    first = [(8, 64, False), (64, True, True), (64, 8, False)]
    for kind, last in (("mlp", []), ("mlp_bn", [(8, False, False)])):
        config = MoCoConfig(prediction_head=kind, projection_hidden_dim=64, projection_dim=8)
        assert list(layers_of(build_predictor(config, 32))) == first + last


def test_positions_of_moco_v3_have_the_row_before_the_column():
    height, width, dim = 2, 3, 8
    positions = fixed_positions(height, width, dim)
    for row in range(height):
        for column in range(width):
            expected = []
            for place in (row, column):
                angles = [place / 10_000 ** (i / (dim // 4)) for i in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(positions[row * width + column], torch.tensor(expected))
    with pytest.raises(ValueError, match="multiple of 4"):
        fixed_positions(2, 2, 6)


def test_the_stem_of_a_moco_v3_vit_keeps_its_values_in_contrastive_training_alone(tmp_path):
    config = MoCoConfig(architecture="test_vit", model_args={"img_size": 32}, stem="moco_v3", queue_size=32)
    model = MoCoModel(config)
    grid = model.encoder_q.patch_embed.grid_size
    torch.testing.assert_close(model.encoder_q.pos_embed[0, 1:], fixed_positions(*grid, model.encoder_q.embed_dim))
    assert not model.encoder_q.pos_embed[0, 0].any()
    fixed = {"encoder_q.pos_embed", "encoder_q.patch_embed.proj.weight", "encoder_q.patch_embed.proj.bias"}
    model.save_pretrained(tmp_path)
    for one in (model, MoCoModel.from_pretrained(tmp_path)):
        still = {name for name, p in one.named_parameters() if not p.requires_grad and not name.startswith("encoder_k")}
        assert still == fixed | {name for name in still if name.startswith("projector_k")}
    alone = MoCoModel.from_pretrained(tmp_path, momentum_encoder=False)
    assert all(p.requires_grad for p in alone.parameters())  # fine-tuning trains everything


def test_residual_blocks_begin_as_the_identity_where_moco_v3_has_them_so():
    for zero in (False, True):
        encoder = MoCoModel(MoCoConfig(architecture="resnet18", zero_init_residual=zero, queue_size=32)).encoder_q
        assert encoder.layer1[0].bn2.weight.any() != zero
        assert encoder.layer1[0].bn1.weight.all()
    with pytest.raises(ValueError, match="zero_init_residual=True is for ResNets, not for test_vit"):
        MoCoModel(MoCoConfig(architecture="test_vit", zero_init_residual=True))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"key_encoder": "none"}, "each key would be the query itself"),
        ({"key_encoder": "shared"}, "keys in a queue have no gradient"),
        ({"dictionary": "bank"}, "a bank keeps the queries themselves"),
        ({"dictionary": "bank", "key_encoder": "none"}, "batch_norm='shuffle' shuffles keys, and none are encoded"),
        ({"dictionary": "bank", "key_encoder": "none", "symmetric_loss": True}, "a bank has one view"),
        ({"dictionary": "batch_both_views"}, "each view has the keys of the other"),
        ({"dictionary": "batch", "key_encoder": "none", "batch_norm": "plain"}, "each view has the keys of the other"),
        (
            {"dictionary": "batch", "key_encoder": "shared", "prediction_head": "mlp"},
            "predicts the key of another encoder",
        ),
        ({"projection_head": "mlp_bn", "batch_norm": "split"}, "the heads have BatchNorm1d"),
    ],
)
def test_settings_that_mean_nothing_together_are_refused_with_the_reason(settings, reason):
    with pytest.raises(Exception, match=reason) as error:
        MoCoConfig(**settings)
    assert isinstance(error.value, ValueError) or isinstance(error.value.__cause__, ValueError)


def test_a_view_too_many_or_too_few_is_refused():
    x = torch.randn(2, 4, 3, 32, 32)
    with pytest.raises(ValueError, match=r"dictionary \('bank'\) takes index, of one view"):
        MoCoModel(method_config("bank"))(x[0], x[1])
    with pytest.raises(ValueError, match=r"dictionary \('queue'\) takes key_pixel_values, the second view"):
        MoCoModel(method_config("queue"))(x[0], index=torch.arange(4))
    with pytest.raises(ValueError, match=r"bank_size \(0\) must be the number of images"):
        MoCoModel(method_config("bank", bank_size=0))


def test_weights_of_one_method_begin_another(tmp_path):
    torch.manual_seed(1)
    MoCoModel(method_config("simclr")).save_pretrained(tmp_path)
    config = method_config("queue", projection_head="simclr", projection_layers=3)
    model = MoCoModel.from_pretrained(tmp_path, config=config)
    for name, tensor in model.encoder_q.state_dict().items():
        assert torch.equal(tensor, model.encoder_k.state_dict()[name]), name
    assert isinstance(model.dictionary, QueueDictionary)
    assert model.dictionary.queue.norm(dim=0).sub(1).abs().max() < 1e-5


def test_a_synchronised_head_that_no_checkpoint_has_begins_as_batch_norm_does(tmp_path):
    MoCoModel(method_config("simclr"), momentum_encoder=False).save_pretrained(tmp_path)
    model = MoCoModel.from_pretrained(tmp_path, config=method_config("simclr", batch_norm="sync"))
    norms = [m for m in model.projector_q if isinstance(m, torch.nn.SyncBatchNorm)]
    assert len(norms) == 3
    for norm in norms:
        assert (norm.weight == 1).all()
        assert (norm.running_var == 1).all()
        assert norm.bias is None or not norm.bias.any()
        assert not norm.running_mean.any()
        assert norm.num_batches_tracked == 0
    assert norms[-1].bias is None
