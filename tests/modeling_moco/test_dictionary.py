"""The queue against a plain deque, and the loss at values that can be worked out by hand."""

import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.dictionary_moco import COLUMNS, BankDictionary, QueueDictionary, info_nce
from training.benchmarks.measure import PeakMemory, in_own_process


def unit(*shape):
    return F.normalize(torch.randn(shape), dim=-1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MoCoConfig(architecture="test_resnet", queue_size=64, projection_dim=16, batch_norm="plain")
    return MoCoModel(config).eval()


def test_queue_keeps_the_newest_keys_oldest_first_as_a_deque_does():
    torch.manual_seed(0)
    dictionary = QueueDictionary(dim=4, size=13)
    oracle = deque(dictionary.queue.T.clone(), maxlen=13)
    for n in [5, 1, 6, 13, 4, 12, 3, 7, 7, 7, 2, 13, 11]:
        keys = unit(n, 4)
        dictionary.enqueue(keys)
        oracle.extend(keys)
        oldest_first = dictionary.queue.roll(-int(dictionary.queue_ptr), dims=1).T
        assert torch.equal(oldest_first, torch.stack(list(oracle)))


def test_keys_fill_the_columns_from_the_pointer_on_and_wrap_around():
    dictionary, keys = QueueDictionary(dim=4, size=5), unit(7, 4)
    dictionary.enqueue(keys[:4])
    assert torch.equal(dictionary.queue[:, :4], keys[:4].T)
    dictionary.enqueue(keys[4:])
    assert torch.equal(dictionary.queue, keys[[5, 6, 2, 3, 4]].T)
    assert dictionary.queue_ptr.tolist() == [2]


@pytest.mark.parametrize(
    "make",
    [lambda: QueueDictionary(16, 4096).queue, lambda: BankDictionary(16, 4096, size=8, momentum=0.5).bank.T],
    ids=["queue", "bank"],
)
def test_first_keys_are_uniform_directions_that_the_seed_alone_determines(make):
    """As in the official code they are normal numbers of unit length, but no encoder of another size changes them."""
    torch.manual_seed(1)
    before, weights = make(), torch.randn(4096)
    assert torch.equal(make(), before)
    torch.manual_seed(2)
    other = make()
    for keys in (before, other):
        torch.testing.assert_close(keys.norm(dim=0), torch.ones(4096))
        torch.testing.assert_close(keys @ keys.T / 4096, torch.eye(16) / 16, atol=0.006, rtol=0)
        assert keys.mean(dim=1).abs().max() < 4.5 * (1 / 16 / 4096) ** 0.5
    # Neither another seed's keys nor the weights of the same seed are the same numbers.
    for numbers in (other.flatten()[:4096], weights):
        assert torch.corrcoef(torch.stack([before.flatten()[:4096], numbers]))[0, 1].abs() < 0.08
    torch.manual_seed(1)
    assert torch.corrcoef(torch.stack([before.flatten()[:4096], torch.randn(4096)]))[0, 1].abs() < 0.08


def test_positive_is_absent_from_the_negatives_until_it_is_enqueued(model):
    images = torch.randn(4, 3, 32, 32)
    queue = model.dictionary.queue.clone()
    with torch.no_grad():
        before = model(images, images)  # equal encoders and images: a key equals its query
        assert torch.equal(model.dictionary.queue, queue)
        model.dictionary.enqueue(before.key_embeds)
        after = model(images, images)
    highest = torch.full((4,), 1 / model.config.temperature)
    torch.testing.assert_close(before.logits[:, 0], highest)
    assert (before.logits[:, 1:] < 0.99 * highest[0]).all()
    torch.testing.assert_close(after.logits[:, 1:].max(dim=1).values, highest)


@pytest.mark.parametrize("temperature", [0.07, 1])
def test_equal_similarities_give_the_logarithm_of_k_plus_one(model, temperature):
    model.config.temperature = temperature
    x_q, x_k = torch.randn(4, 3, 32, 32), torch.randn(1, 3, 32, 32).expand(4, -1, -1, -1)
    with torch.no_grad():
        key = model.encode_keys(x_k)[0]
        model.dictionary.queue.copy_(key[:, None].expand(16, 64))
        loss = model(x_q, x_k).loss
    assert loss.item() == pytest.approx(math.log(64 + 1), abs=1e-5)


def joined(q, k, queue):
    return torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue], dim=1)


def test_logits_are_similarities_over_the_temperature_with_the_own_key_first():
    dictionary, q, k = QueueDictionary(dim=4, size=5), unit(3, 4), unit(3, 4)
    loss, logits = dictionary(q.requires_grad_()[None], k[None], 0.07)
    torch.testing.assert_close(logits, joined(q, k, dictionary.queue).detach() / 0.07)
    before = logits.clone()
    loss.backward()
    assert torch.equal(logits, before)
    assert not logits.requires_grad


@pytest.mark.parametrize("keys", [1, 12, COLUMNS, 2 * COLUMNS + 3])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_those_of_cross_entropy(keys, temperature, dtype):
    torch.manual_seed(0)
    q, k, queue = (unit(n, 16).to(dtype) for n in (6, 6, keys))
    losses, gradients = [], []
    for loss_of in (
        lambda q: info_nce(q, k, queue.T, temperature)[0],
        lambda q: F.cross_entropy(joined(q, k, queue.T) / temperature, torch.zeros(6).long()),
    ):
        x = q.clone().requires_grad_()
        losses.append(loss_of(x))
        (3 * losses[-1]).backward()  # not 1, which would hide a forgotten factor
        gradients.append(x.grad / 3)
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    # Rounding grows as the logits do: with similarities over 0.07 in float32, 1.07e-6 has been seen.
    torch.testing.assert_close(*gradients, atol=max(1e-6, 2e-7 / temperature), rtol=0)


def test_gradient_is_that_of_finite_differences():
    k, queue = torch.randn(3, 4).double(), torch.randn(4, 13).double()
    q = torch.randn(3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda q: info_nce(q, k, queue, 0.2)[0], q)


def test_logits_that_were_changed_before_backward_are_an_error_and_no_wrong_gradient():
    loss, logits = info_nce(unit(3, 4).requires_grad_(), unit(3, 4), unit(5, 4).T, 0.2)
    logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def matrices_held() -> dict[str, float]:
    n, size = 64, 2**18  # 67 MB, which the C library returns to the system as soon as it is free
    k, queue = unit(n, 8), unit(size, 8).T.contiguous()
    held = {}
    for name, loss_of in {
        "ours": lambda q, queue: info_nce(q, k, queue, 0.2)[0],
        "cross-entropy": lambda q, queue: F.cross_entropy(joined(q, k, queue) / 0.2, torch.zeros(n).long()),
    }.items():
        q = unit(n, 8).requires_grad_()
        loss_of(q, queue[:, :9]).backward()  # what is loaded at the first call is not the matrix's
        with PeakMemory() as memory:
            loss_of(q, queue).backward()
        held[name] = memory.bytes / (4 * n * (1 + size))
    return held


@pytest.mark.slow
def test_a_step_of_the_loss_holds_one_matrix_of_logits():
    held = in_own_process(matrices_held)  # this one may keep what earlier tests have freed
    print(held)
    assert 0.9 < held["ours"] < 1.3
    assert held["cross-entropy"] > 2.5


def test_columns_have_unit_length_at_the_start_and_after_training_steps(model):
    ones = torch.ones(64)
    torch.testing.assert_close(model.dictionary.queue.norm(dim=0), ones)
    assert (model.dictionary.queue.T @ model.dictionary.queue).fill_diagonal_(0).abs().max() < 0.99  # not one direction
    model.train()
    for _ in range(5):
        images = torch.randn(14, 3, 32, 32)
        model.dictionary.enqueue(model(images, images).key_embeds)
    torch.testing.assert_close(model.dictionary.queue.norm(dim=0), ones)


def test_more_keys_than_the_queue_holds_are_rejected_and_change_nothing():
    dictionary = QueueDictionary(dim=4, size=5)
    queue = dictionary.queue.clone()
    with pytest.raises(ValueError, match=r"queue_size \(5\).*global batch \(6\)"):
        dictionary.enqueue(unit(6, 4))
    assert torch.equal(dictionary.queue, queue)
    assert dictionary.queue_ptr.item() == 0


def test_queue_of_a_bfloat16_model_stores_float32_keys(model):
    half = MoCoModel._from_config(model.config, dtype=torch.bfloat16)
    images = torch.randn(8, 3, 32, 32, dtype=torch.bfloat16)
    outputs = half(images, images)
    half.dictionary.enqueue(outputs.key_embeds)
    assert next(half.encoder_k.parameters()).dtype == torch.bfloat16
    assert half.dictionary.queue.dtype == outputs.logits.dtype == torch.float32
    assert torch.equal(half.dictionary.queue[:, :8], outputs.key_embeds.T)
    assert not torch.equal(half.dictionary.queue, half.dictionary.queue.bfloat16().float())
