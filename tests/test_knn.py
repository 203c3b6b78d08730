"""The kNN monitor against scikit-learn, and features that leave the model as it was."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.image_processing_moco import normalize
from training.augment import EvaluationView
from training.data import DataArguments, load_images
from training.images import MapImages
from training.knn import evaluate_knn, extract_features, knn_predict, nearest

CLASSES, DIM, TEMPERATURE = 5, 16, 0.07


@pytest.fixture(scope="module")
def clusters():
    """Overlapping clusters on the unit sphere: bank (500, D) and queries (200, D) with their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (700,), generator=generator)
    centres = torch.randn(CLASSES, DIM, generator=generator)
    features = F.normalize(centres[labels] + 1.5 * torch.randn(700, DIM, generator=generator), dim=1)
    return features[:500], labels[:500], features[500:], labels[500:]


@pytest.mark.parametrize("k", [20, 200])
@pytest.mark.parametrize("temperature", [TEMPERATURE, 1.0])
def test_votes_agree_with_scikit_learn(clusters, k, temperature):
    bank, labels, queries, truth = clusters
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(bank.double(), labels)
    predicted = knn_predict(queries, bank, labels, num_classes=CLASSES, k=k, temperature=temperature)
    assert predicted.tolist() == reference.predict(queries.double()).tolist()
    assert 0.5 < (predicted == truth).float().mean() < 1  # neither trivial nor hopeless


def test_near_neighbours_outvote_many_far_ones():
    bank = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.2, 1.0]]), dim=1)
    labels = torch.tensor([0, 1, 1, 1])
    votes = {"num_classes": 2, "k": 4}
    assert knn_predict(bank[:1], bank, labels, temperature=0.07, **votes).tolist() == [0]
    assert knn_predict(bank[:1], bank, labels, temperature=100.0, **votes).tolist() == [1]


def test_a_bank_vector_finds_itself(clusters):
    bank, labels, *_ = clusters
    assert torch.equal(knn_predict(bank, bank, labels, num_classes=CLASSES, k=1), labels)


def test_predictions_do_not_depend_on_the_chunk(clusters):
    bank, _, queries, _ = clusters
    whole = torch.cat([index.sort().values for _, index in nearest(queries, bank, 10)])
    pieces = torch.cat([index.sort().values for _, index in nearest(queries, bank, 10, chunk=33)])
    assert torch.equal(whole, pieces)


def test_more_neighbours_than_the_bank_has_are_refused(clusters):
    bank, labels, queries, _ = clusters
    with pytest.raises(ValueError, match=r"k \(501\) is larger than the bank \(500 images\): lower it"):
        knn_predict(queries, bank, labels, num_classes=CLASSES, k=501)
    assert len(knn_predict(queries, bank, labels, num_classes=CLASSES, k=500)) == len(queries)


# Features


@pytest.fixture(scope="module")
def digits():
    args = DataArguments(dataset_name="digits", image_size=32, eval_resize=32, max_train_samples=100)
    splits = load_images(args)
    bank, queries = (MapImages(split, args.evaluation_view()) for split in (splits.train, splits.eval))
    return bank, queries.first(30)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MoCoModel(MoCoConfig(architecture="test_resnet", queue_size=64, batch_norm="plain"))
    # Statistics unlike those of any batch.
    for module in model.encoder_q.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_features_are_those_of_a_forward_in_evaluation_mode_and_change_nothing(model, digits, training):
    bank, _ = digits
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    features, labels = extract_features(model, bank, batch_size=32)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    pixels = torch.stack([bank[i]["pixel_values"] for i in range(len(bank))])
    with torch.no_grad():
        direct = model.eval()(normalize(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)).pooler_output
    torch.testing.assert_close(features, F.normalize(direct, dim=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(bank)))
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert labels.tolist() == bank.source["label"][:]


def test_features_keep_their_order_over_batches_and_workers(model, digits):
    _, queries = digits
    whole, labels = extract_features(model, queries, batch_size=30)
    pieces, piece_labels = extract_features(model, queries, batch_size=7, num_workers=2)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
    assert torch.equal(piece_labels, labels)


def test_accuracy_is_the_share_of_right_answers_in_per_cent(model, digits):
    bank, queries = digits
    assert evaluate_knn(model, bank, bank, k=1) == {"knn_top1": 100.0}
    (features, labels), (q, truth) = (extract_features(model, images) for images in (bank, queries))
    reference = KNeighborsClassifier(1, algorithm="brute").fit(features, labels)
    expected = 100 * reference.score(q, truth)
    assert evaluate_knn(model, bank, queries, k=1)["knn_top1"] == pytest.approx(expected)


def test_a_wrong_label_in_the_bank_costs_its_share(model):
    # Four plain colours; the last one's label in the queries is not the bank's.
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250)]

    class Plain(torch.utils.data.Dataset):
        def __init__(self, labels):
            self.labels = labels

        def __len__(self):
            return len(colours)

        def __getitem__(self, i):
            view = EvaluationView(32, 32)(Image.new("RGB", (32, 32), colours[i]), torch.Generator())
            return view | {"labels": self.labels[i]}

    assert evaluate_knn(model, Plain([0, 1, 2, 3]), Plain([0, 1, 2, 0]), k=1) == {"knn_top1": 75.0}
