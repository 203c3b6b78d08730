"""The modes of BatchNorm, and three gloo processes against one."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.distributed_moco import exchange, gather, local_slice

RANKS, LOCAL_BATCH = 3, 4  # with two ranks everyone sends as much as he receives
ALL_ROWS = torch.arange(RANKS * LOCAL_BATCH).view(RANKS, LOCAL_BATCH)
PARTS = [
    torch.tensor([[0, 1, 2, 11], [3, 4, 5, 8], [6, 7, 9, 10]]),
    ALL_ROWS.roll(1, 0),
    ALL_ROWS,
]


def moco(batch_norm, splits=2):
    torch.manual_seed(0)
    return MoCoModel(
        MoCoConfig(
            architecture="test_resnet",
            queue_size=64,
            projection_dim=16,
            batch_norm=batch_norm,
            batch_norm_splits=splits,
        )
    )


def test_state_dicts_are_the_same_in_every_mode():
    plain = moco("plain").state_dict()
    for mode in ("split", "shuffle", "sync"):
        state = moco(mode).state_dict()
        assert state.keys() == plain.keys()
        assert all(torch.equal(state[name], plain[name]) for name in plain)


def test_split_mode_rejects_a_batch_norm_it_cannot_imitate():
    with pytest.raises(ValueError, match=r"test_efficientnet has BatchNormAct2d at 'bn1'"):
        MoCoModel(MoCoConfig(architecture="test_efficientnet", batch_norm="split"))


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet"])
def test_sync_mode_computes_what_plain_computes_in_one_process(architecture):
    images = torch.randn(4, 3, 64, 64)
    plain, sync = (
        MoCoModel(MoCoConfig(architecture=architecture, queue_size=8, batch_norm=m)) for m in ("plain", "sync")
    )
    sync.load_state_dict(plain.state_dict())
    for mode in (True, False):
        expected, ours = (m.train(mode)(images).pooler_output for m in (plain, sync))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_split_mode_returns_keys_in_the_order_of_the_images():
    images = torch.randn(8, 3, 32, 32)
    split, plain = moco("split").eval(), moco("plain").eval()
    for _ in range(3):  # another shuffle each time
        torch.testing.assert_close(split.encode_keys(images), plain.encode_keys(images))


def test_split_mode_trains_on_groups_that_change_from_batch_to_batch():
    images = torch.randn(8, 3, 64, 64)
    model = moco("split", splits=4)
    assert not torch.allclose(model.encode_keys(images), model.encode_keys(images), atol=1e-3)
    # One group of all images does not depend on the order, so in training too every key is its own image's.
    model, plain = moco("split", splits=1), moco("plain")
    torch.testing.assert_close(model.encode_keys(images), plain.encode_keys(images), atol=1e-4, rtol=1e-4)


def _run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    images = torch.load(f"{folder}/images.pt")[rank * LOCAL_BATCH : (rank + 1) * LOCAL_BATCH]
    model = moco("shuffle").eval()
    torch.manual_seed(100 + rank)  # the order of the shuffle does not hang on the global generator
    outputs = model(images, images)
    result = {
        "gathered": gather(torch.tensor([[rank, rank], [0, 1]]).T),
        "exchanged": [exchange(100 + ALL_ROWS[rank], parts) for parts in PARTS],
        "slice": local_slice(LOCAL_BATCH),
        "keys": model.encode_keys(images),
        "positives": outputs.logits[:, 0].detach(),
    }
    model.train().encode_keys(images)
    result["running_mean"] = model.encoder_k.conv1[1].running_mean
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_three_processes_encode_keys_as_one_but_normalise_shuffled_images(tmp_path):
    torch.manual_seed(1)
    images = torch.randn(RANKS * LOCAL_BATCH, 3, 64, 64) + torch.arange(RANKS * LOCAL_BATCH).view(-1, 1, 1, 1)
    torch.save(images, tmp_path / "images.pt")
    run_ranks(_run_rank, (str(tmp_path),), RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]

    model = moco("plain").eval()
    keys = model.encode_keys(images)
    for rank, result in enumerate(ranks):
        assert result["gathered"].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]
        assert [x.tolist() for x in result["exchanged"]] == [(100 + parts[rank]).tolist() for parts in PARTS]
        assert result["slice"] == slice(rank * LOCAL_BATCH, (rank + 1) * LOCAL_BATCH)
        torch.testing.assert_close(result["keys"], keys, atol=1e-5, rtol=1e-4)
        # Query and key encoder are equal and see the same image, so the positive of every query is its own key.
        torch.testing.assert_close(result["positives"], torch.full((LOCAL_BATCH,), 1 / model.config.temperature))

    unshuffled = []
    for local in images.split(LOCAL_BATCH):
        model = moco("plain")
        model.encode_keys(local)
        unshuffled.append(model.encoder_k.conv1[1].running_mean)
    seen = [result["running_mean"] for result in ranks]
    for ours, alone in zip(seen, unshuffled, strict=True):
        assert not torch.allclose(ours, alone, atol=1e-2)
    # The first BatchNorm averages linearly, so the mean over ranks shows that each image was encoded exactly once.
    torch.testing.assert_close(sum(seen), sum(unshuffled), atol=1e-5, rtol=1e-4)
