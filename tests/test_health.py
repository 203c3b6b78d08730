"""Health metrics against their definitions; a collapsed and a leaking run, made on purpose, are recognised."""

import logging
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from ranks import join_trainers, run_ranks
from tiny_trainer import build as build_trainer
from tiny_trainer import image_rows
from torch import nn

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.dictionary_moco import QueueDictionary
from training import monitor
from training.data.images import MapImages
from training.data.sources import DataArguments, load_images
from training.errors import TrainingError
from training.evaluation.knn import KNNArguments
from training.health import diagnose, key_drift, leak, queue_age, rankme, slow_process, uniformity_kernel
from training.monitor import Monitor
from training.trainer import MoCoTrainer, MoCoTrainingArguments
from training.views.pil import EvaluationView

SIZE, IMAGES, BATCH = 16, 128, 16


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=1)


def test_uniformity_is_the_mean_over_pairs_of_different_rows():
    torch.manual_seed(0)
    x = unit(9, 5).double()
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    expected = np.mean([math.exp(-2 * ((x[i] - x[j]) ** 2).sum()) for i, j in pairs])
    assert uniformity_kernel(x).item() == pytest.approx(expected, rel=1e-6)
    assert uniformity_kernel(x[:1].repeat(4, 1)).log().item() == pytest.approx(0, abs=1e-6)
    assert uniformity_kernel(unit(2000, 128)).log().item() == pytest.approx(-4, abs=0.1)  # a wide sphere: |x - y|² is 2


def test_rankme_counts_the_dimensions_that_features_fill():
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(64, 64))
    assert rankme(basis[:, :7].T.repeat(10, 1)) == pytest.approx(7, rel=1e-3)
    x = torch.randn(300, 20) @ torch.randn(20, 50)
    values = np.linalg.svd(x.numpy(), compute_uv=False)
    p = values / values.sum() + 1e-7
    assert rankme(x) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-3)
    for constant in (torch.ones(30, 8), torch.zeros(30, 8)):
        assert rankme(constant) == pytest.approx(1, abs=1e-3)


RANKS, SEEN = 2, 51  # images, which do not divide by two


def look_at_a_share(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    (folder / f"{rank}.txt").write_text(repr(look(folder)))
    dist.destroy_process_group()


def look(folder) -> float:
    model, bank = torch.load(folder / "inputs.pt", weights_only=False)
    settings = KNNArguments(per_device_eval_batch_size=7, dataloader_num_workers=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "RANKME_IMAGES", SEEN // 2)  # every second image is used
        return Monitor(model, settings, bank).look_at_features()["rankme"]


def test_two_processes_see_the_rankme_of_one(tmp_path):
    torch.manual_seed(0)
    model = MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=64)).eval()
    digits = load_images(DataArguments(dataset_name="digits", image_size=32, eval_resize=32, max_train_samples=SEEN))
    torch.save((model, MapImages(digits.train, EvaluationView(32, 32))), tmp_path / "inputs.pt")
    alone = look(tmp_path)
    assert alone > 1.5  # features of a collapsed model would agree whatever is gathered
    run_ranks(look_at_a_share, (tmp_path,), RANKS)
    for rank in range(RANKS):
        assert float((tmp_path / f"{rank}.txt").read_text()) == pytest.approx(alone, rel=1e-4)


def test_key_drift_is_zero_for_a_copy_and_relative_to_the_query_encoder():
    model = MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=64, batch_norm="plain"))
    assert key_drift(model) == 0
    with torch.no_grad():
        for k in [*model.encoder_k.parameters(), *model.projector_k.parameters()]:
            k.mul_(1.25)
    assert key_drift(model) == pytest.approx(25, rel=1e-4)


@pytest.mark.parametrize(("size", "keys"), [(12, 4), (10, 4), (4, 4)])
def test_the_age_of_the_oldest_key_is_that_of_a_queue_whose_keys_carry_their_step(size, keys):
    queue = QueueDictionary(1, size)
    queue.queue.fill_(0)  # the random start counts as step 0
    for step in range(1, 9):
        found = step - 1 - int(queue.queue.min())  # by the step that is about to enqueue
        assert queue_age(size, keys, step - 1) == found + (queue.queue.min() > 0)
        queue.enqueue(torch.full((keys, 1), float(step)))


# Runs


class PlainViews:
    """Both views are the image."""

    def __call__(self, image, generator):
        view = EvaluationView(SIZE, SIZE)(image, generator)["pixel_values"]
        return {"pixel_values": view, "key_pixel_values": view}


@pytest.fixture(scope="module")
def rows():
    """Images of random brightness whose corner is the same gray: by content, nobody can tell their corners apart."""
    rng = np.random.default_rng(0)
    images = []
    for level in rng.uniform(0, 255, (IMAGES, 3)):
        pixels = np.tile(level, (SIZE, SIZE, 1))
        pixels[:6, :6] = 128
        images.append(Image.fromarray(pixels.astype(np.uint8)))
    rows = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
    return rows.cast_column("image", datasets.Image(decode=False))


def build(rows, folder, epochs=3, prepare=lambda model: None, **config) -> MoCoTrainer:
    torch.manual_seed(0)
    model = MoCoModel(
        MoCoConfig(
            **{
                "architecture": "test_resnet",
                "stem": "no_max_pool",
                "queue_size": 64,
                "temperature": 0.1,
                "key_momentum": 0.9,
            }
            | config
        )
    )
    prepare(model)
    args = MoCoTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=5,
        save_strategy="no",
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        learning_rate=0.05,
    )
    args.eval_on_start = True  # as scripts/pretrain.py does
    bank = MapImages(rows, EvaluationView(SIZE, SIZE))
    return MoCoTrainer(model, args, MapImages(rows, PlainViews()), None, bank)


def train(*args, **kwargs) -> MoCoTrainer:
    trainer = build(*args, **kwargs)
    trainer.train()
    return trainer


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_rankme" in entry]


def test_plain_batch_norm_in_one_process_leaks_and_is_told_what_to_do(rows, tmp_path, caplog):
    trainer = train(rows, tmp_path, batch_norm="plain")
    last = evaluations(trainer)[-1]
    assert last["eval_leaks"] == 1
    assert last["eval_contrast_top1"] > last["eval_contrast_top1_shuffled"] + 30
    assert caplog.text.count("BatchNorm leaks") == 1  # not once for each evaluation
    assert "pass --batch_norm split" in caplog.text


def test_split_batch_norm_does_not_leak(rows, tmp_path, caplog):
    trainer = train(rows, tmp_path, batch_norm="split", batch_norm_splits=4)
    assert evaluations(trainer)[-1]["eval_leaks"] == 0
    assert "leaks" not in caplog.text
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["queue_age"] for entry in logged] == [4, 4, 4, 4, 4]  # 64 keys, 16 a step
    for entry in logged:
        assert 0 < entry["key_drift"] < 100
        assert entry["alignment"] == pytest.approx(2 - 2 * entry["positive_similarity"])
        assert entry["hardest_negative_similarity"] <= 1
        assert -4 < entry["uniformity"] < 0


def test_constant_features_are_called_a_collapse(rows, tmp_path, caplog):
    def collapse(model):
        for encoder in (model.encoder_q, model.encoder_k):
            nn.init.zeros_(encoder.conv1[0].weight)

    trainer = train(rows, tmp_path, prepare=collapse, batch_norm="plain", epochs=1)
    assert evaluations(trainer)[-1]["eval_rankme"] == pytest.approx(1, abs=1e-3)
    assert caplog.text.count("the encoder has collapsed") == 1
    assert "--learning_rate" in caplog.text


def test_weights_that_are_not_finite_end_the_run_in_words_and_not_in_a_decomposition(rows, tmp_path):
    trainer = build(rows, tmp_path, batch_norm="plain")
    trainer.model.encoder_q.conv1[0].weight.data.fill_(math.nan)
    with pytest.raises(TrainingError, match="no longer finite"):
        trainer.evaluate()


def test_the_leak_test_changes_nothing(rows):
    torch.manual_seed(0)
    model = MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=64, batch_norm="plain")).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    views = [(torch.randint(256, (8, 3, SIZE, SIZE), dtype=torch.uint8),) * 2 for _ in range(4)]
    leak(model, views)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_features_that_are_not_finite_are_named_and_not_measured():
    features = torch.randn(20, 8)
    features[3, 2] = math.inf
    assert math.isnan(rankme(features))
    assert math.isnan(rankme(1e200 * torch.ones(20, 8, dtype=torch.float64)))
    (sentence,) = diagnose({"rankme": math.nan}, MoCoConfig(batch_norm="plain")).values()
    assert "are not finite" in sentence


def test_healthy_numbers_get_no_sentence():
    healthy = {"rankme": 30.0, "uniformity": -1.0, "contrast_top1": 50.0, "contrast_top1_shuffled": 49.0, "leaks": 0.0}
    assert diagnose(healthy, MoCoConfig(batch_norm="plain")) == {}
    for batch_norm in ("plain", "shuffle", "split", "sync"):
        (sentence,) = diagnose(healthy | {"leaks": 1.0}, MoCoConfig(batch_norm=batch_norm)).values()
        assert "--batch_norm" in sentence


@pytest.mark.parametrize(
    ("waited", "names"),
    [
        ([0.1, 6.0, 0.3, 0.2], "process 1 has waited 60 % of the time for its images, the others 2 %"),
        ([5.0, 6.0], None),
        ([9.0], None),
        ([0.0, 0.0, 1.9], None),
    ],
)
def test_the_process_that_all_wait_for_is_named(waited, names):
    problem = slow_process(waited, seconds=10.0)
    assert problem is None if names is None else names in problem


def _train_with_a_slow_process(rank: int, folder: str) -> None:
    join_trainers(rank, folder, 2)
    trainer = build_trainer(image_rows(), Path(folder) / "run")
    waited = 1000.0 * rank
    inner = trainer._training_metrics

    def late() -> dict[str, float]:
        trainer._waited += waited
        return inner()

    trainer._training_metrics = late
    with open(f"{folder}/{rank}.log", "w") as file:
        logging.getLogger("training.trainer").addHandler(logging.StreamHandler(file))
        trainer.train()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_slow_process_is_named_once_by_the_main_one(tmp_path):
    run_ranks(_train_with_a_slow_process, (str(tmp_path),), 2)
    assert (tmp_path / "0.log").read_text().count("process 1 has waited") == 1
    assert (tmp_path / "1.log").read_text() == ""
