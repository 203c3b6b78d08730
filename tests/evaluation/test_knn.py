"""The kNN monitor against scikit-learn, and features that leave the model as it was."""

import math

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from ranks import run_ranks
from sklearn.neighbors import KNeighborsClassifier
from tiny_models import save_encoder
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_moco import MoCoConfig, MoCoModel
from modeling_moco.image_processing_moco import normalize
from training import monitor as monitor_module
from training.data.decode import Decoder
from training.data.images import MapImages
from training.data.sources import DataArguments, load_images
from training.engine.results import encoder_digest
from training.evaluation import features as features_module
from training.evaluation import knn
from training.evaluation.features import cached_features, extract_features, unit
from training.evaluation.knn import KNNArguments, evaluate_knn, knn_predict, nearest
from training.monitor import Monitor
from training.views.pil import EvaluationView

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
    predicted = knn_predict(queries, bank, labels, knn_k=[k], temperature=temperature)[k]
    assert predicted.tolist() == reference.predict(queries.double()).tolist()
    assert 0.5 < (predicted == truth).float().mean() < 1  # neither trivial nor hopeless


def test_near_neighbours_outvote_many_far_ones():
    bank = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.2, 1.0]]), dim=1)
    labels = torch.tensor([0, 1, 1, 1])
    assert knn_predict(bank[:1], bank, labels, knn_k=[4], temperature=0.07)[4].tolist() == [0]
    assert knn_predict(bank[:1], bank, labels, knn_k=[4], temperature=100.0)[4].tolist() == [1]


def test_a_bank_vector_finds_itself(clusters):
    bank, labels, *_ = clusters
    assert torch.equal(knn_predict(bank, bank, labels, knn_k=[1])[1], labels)


@pytest.mark.parametrize(("bank_chunk", "query_chunk"), [(7, 33), (499, 200), (500, 1), (10_000, 10_000)])
def test_neighbours_are_the_best_of_all_chunks_nearest_first(clusters, bank_chunk, query_chunk, monkeypatch):
    bank, _, queries, _ = clusters
    monkeypatch.setattr(knn, "BANK_CHUNK", bank_chunk)
    monkeypatch.setattr(knn, "QUERY_CHUNK", query_chunk)
    similarity, index = nearest(3 * queries, bank * torch.rand(500, 1).add(0.1), 10)  # lengths do not matter
    ordered = (queries @ bank.T).sort(dim=1, descending=True)
    torch.testing.assert_close(similarity, ordered.values[:, :10])
    assert torch.equal(index, ordered.indices[:, :10])


def test_several_k_agree_with_each_by_itself(clusters):
    bank, labels, queries, _ = clusters
    together = knn_predict(queries, bank, labels, knn_k=[200, 1, 20])
    assert list(together) == [200, 1, 20]
    for k, predicted in together.items():
        assert torch.equal(predicted, knn_predict(queries, bank, labels, knn_k=[k])[k])
    assert not torch.equal(together[1], together[200])


def test_a_tiny_temperature_is_the_nearest_neighbour(clusters):
    bank, labels, queries, _ = clusters
    predicted = knn_predict(queries, bank, labels, knn_k=[200, 1], temperature=1e-4)
    assert torch.equal(predicted[200], predicted[1])


def test_more_neighbours_than_the_bank_has_are_refused(clusters):
    bank, labels, queries, _ = clusters
    with pytest.raises(ValueError, match=r"knn_k \(501\) is larger than the bank \(500 images\): lower it"):
        knn_predict(queries, bank, labels, knn_k=[20, 501])
    assert len(knn_predict(queries, bank, labels, knn_k=[500])[500]) == len(queries)


@pytest.mark.parametrize(
    ("values", "wrong"),
    [({"knn_k": [20, 0]}, "knn_k"), ({"knn_k": []}, "knn_k"), ({"knn_temperature": 0}, "knn_temperature")],
)
def test_settings_out_of_range_are_refused_by_name(values, wrong):
    with pytest.raises(ValueError, match=rf"^{wrong} \("):
        KNNArguments(**values)


# Features


@pytest.fixture(scope="module")
def digits():
    args = DataArguments(dataset_name="digits", image_size=32, eval_resize=32, max_train_samples=100)
    splits = load_images(args)
    bank, queries = (MapImages(split, args.evaluation_view()) for split in (splits.train, splits.eval))
    return bank, queries.rows(0, 30)


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
    torch.testing.assert_close(features, direct, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unit(features).norm(dim=1), torch.ones(len(bank)))
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert labels.tolist() == bank.source["label"][:]


def test_features_keep_their_order_over_batches_and_workers(model, digits):
    _, queries = digits
    whole, labels = extract_features(model, queries, batch_size=30)
    pieces, piece_labels = extract_features(model, queries, batch_size=7, num_workers=2)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(piece_labels, labels)


def top1(model, bank, queries, *knn_k, **kwargs) -> list[float]:
    return [result.value for result in evaluate_knn(model, bank, queries, KNNArguments(knn_k=list(knn_k), **kwargs))]


@pytest.mark.parametrize("feature", ["backbone", "head"])
def test_accuracy_is_the_share_of_right_answers_in_per_cent(model, digits, feature):
    bank, queries = digits
    assert top1(model, bank, bank, 1, knn_features=feature) == [100.0]
    (x, labels), (q, truth) = (extract_features(model, images, feature=feature) for images in (bank, queries))
    assert x.shape[1] == {"backbone": model.encoder_q.num_features, "head": model.config.projection_dim}[feature]
    expected = [100 * KNeighborsClassifier(1, algorithm="brute").fit(unit(x), labels).score(unit(q), truth)]
    assert top1(model, bank, queries, 1, knn_features=feature) == pytest.approx(expected)


@pytest.fixture
def with_predictor():
    """As MoCo v3: a projection with BatchNorm, whose statistics are unlike those of any batch, and a predictor."""
    torch.manual_seed(0)
    settings = {"dictionary": "batch", "symmetric_loss": True, "projection_head": "mlp_bn", "prediction_head": "mlp_bn"}
    model = MoCoModel(MoCoConfig(architecture="test_resnet", batch_norm="plain", projection_dim=8, **settings))
    for module in model.projector_q.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def test_the_heads_feature_is_the_projection_without_the_predictor_and_its_digest_stands_for_that(
    with_predictor, digits
):
    _, queries = digits
    model = with_predictor.eval()
    pixels = torch.stack([queries[i]["pixel_values"] for i in range(len(queries))])
    with torch.no_grad():
        expected = F.normalize(model.projector_q(model.features(pixels).pooler_output), dim=1)
        turned = model.encode_queries(pixels)
    assert not torch.allclose(expected, turned, atol=1e-2)
    torch.testing.assert_close(extract_features(model, queries, feature="head")[0], expected, atol=1e-5, rtol=1e-5)
    digest = encoder_digest(model, "head")
    with torch.no_grad():
        for tensor in (*model.predictor_q.parameters(), *model.predictor_q.buffers()):
            tensor.zero_()
    torch.testing.assert_close(extract_features(model, queries, feature="head")[0], expected, atol=1e-5, rtol=1e-5)
    assert encoder_digest(model, "head") == digest
    next(iter(model.projector_q.buffers())).add_(1)
    assert encoder_digest(model, "head") != digest


def test_a_result_names_its_protocol(model, digits):
    bank, queries = digits
    results = evaluate_knn(
        model, bank, queries, KNNArguments(knn_k=[20, 5], knn_temperature=0.1, knn_features="head", seed=3)
    )
    assert [r.protocol for r in results] == ["weighted kNN, k 20, T 0.1", "weighted kNN, k 5, T 0.1"]
    assert {(r.metric, r.n, r.feature, r.seed) for r in results} == {("top1", 30, "head", 3)}


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

    assert top1(model, Plain([0, 1, 2, 3]), Plain([0, 1, 2, 0]), 1) == [75.0]


# Kept features


def test_features_that_are_too_large_measure_nothing(model, digits, tmp_path):
    bank, queries = digits
    with torch.no_grad():
        for module in model.encoder_q.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(1e30)  # finite, as its products are not
    with pytest.raises(ValueError, match="features that are not finite, too large for float32"):
        evaluate_knn(model, bank, queries, KNNArguments(knn_k=[5]), cache=tmp_path)


def test_kept_features_are_those_extracted_and_belong_to_one_model_and_one_view(model, digits, tmp_path, monkeypatch):
    _, queries = digits
    monkeypatch.setattr(features_module, "ROWS_PER_FILE", 13)
    direct, labels = extract_features(model, queries)
    kept, kept_labels = cached_features(model, queries, tmp_path)
    torch.testing.assert_close(kept, direct, atol=1e-5, rtol=1e-5)
    assert torch.equal(kept_labels, labels)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in sorted(folder.glob("*.arrow"))] == [f"{i:09}.arrow" for i in (0, 13, 26)]
    opened = datasets.Dataset.from_file(str(folder / "000000013.arrow"))
    assert torch.equal(torch.tensor(opened["features"][:]), kept[13:26])

    def fail(*args, **kwargs):
        raise AssertionError("extracted again")

    with monkeypatch.context() as patch:
        patch.setattr(features_module, "extract_features", fail)
        again, _ = cached_features(model, queries, tmp_path)
    assert torch.equal(again, kept)
    (folder / "000000013.arrow").unlink()  # as an interrupted extraction leaves it
    again, _ = cached_features(model, queries, tmp_path)
    torch.testing.assert_close(again, kept, atol=1e-5, rtol=1e-5)

    less = Decoder(max_pixels=10_000).image
    others = [
        queries.rows(1, 30),
        MapImages(queries.source, EvaluationView(40, 32)),
        MapImages(queries.source, queries.transform, decode=less),
    ]
    for count, images in enumerate(others, start=2):
        cached_features(model, images, tmp_path)
        assert len(list(tmp_path.iterdir())) == count
    model.encoder_q.bn1.running_mean[0] += 1
    changed, _ = cached_features(model, queries, tmp_path)
    assert not torch.allclose(changed, kept)
    cached_features(model, queries, tmp_path, feature="head")
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("flags", [["knn"], ["linear_probe", "--mode", "cached"]], ids=["knn", "linear_probe"])
def test_a_damaged_file_of_kept_features_is_one_line(flags, script, tmp_path, capsys):
    name, *flags = flags
    few = ["--dataset_name", "digits", "--max_train_samples", "60", "--max_eval_samples", "20", "--use_cpu"]
    sizes = ["--image_size", "32", "--eval_resize", "32"]
    knn = ["--knn_k", "5"] if name == "knn" else []
    command = [str(save_encoder(tmp_path)), *few, *sizes, *flags, *knn]
    script("knn").main([*command[:1], *few, *sizes, "--knn_k", "5"])
    (path, *_) = sorted(tmp_path.glob("features/*/000000000.arrow"))
    whole = path.read_bytes()
    for content in (b"", whole[:1000], whole.replace(b"features", b"somewhat")):
        path.write_bytes(content)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            script(name).main(command)
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path} is damaged (")
        assert error.endswith("): delete it, and it is made again\n")
    path.unlink()
    if name == "knn":
        script(name).main(command)
        assert path.read_bytes() == whole


# Three processes


RANKS = 3


def evaluate_a_share(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    features_module.ROWS_PER_FILE = 10  # shares do not begin at the first row of every file
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    model, bank, queries = inputs["model"], inputs["bank"], inputs["queries"]
    if rank > 0:  # other statistics than those that rank 0 will save
        model.encoder_q.bn1.running_mean += rank
    all_rows, labels = extract_features(model, bank, batch_size=7)
    mine, my_labels = extract_features(model, bank, batch_size=7, gather=False)
    kept, _ = cached_features(model, queries, folder / "kept")
    my_kept, my_kept_labels = cached_features(model, bank, folder / "kept", gather=False)
    accuracies = [r.value for r in evaluate_knn(model, bank, queries, KNNArguments(knn_k=[40, 3]))]
    accuracies += [r.value for r in evaluate_knn(model, bank, queries, KNNArguments(knn_k=[40, 3]), folder / "kept")]
    outputs = {"all": all_rows, "labels": labels, "mine": mine, "my_labels": my_labels, "kept": kept, "knn": accuracies}
    outputs |= {"my_kept": my_kept, "my_kept_labels": my_kept_labels}
    with_head = inputs["with_head"]
    for module in with_head.projector_q.modules() if rank > 0 else ():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean += rank
    outputs["head"], _ = extract_features(with_head, queries, feature="head")
    torch.save(outputs, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_share_the_images_and_the_bank_without_duplicates_or_omissions(
    model, with_predictor, digits, tmp_path
):
    bank, queries = digits
    bank, queries = bank.rows(0, 50), queries.rows(0, 29)  # neither divides by three; a share is smaller than k
    expected, labels = extract_features(model, bank)
    expected_queries, _ = extract_features(model, queries)
    accuracies = top1(model, bank, queries, 40, 3) * 2
    heads, _ = extract_features(with_predictor, queries, feature="head")
    inputs = {"model": model, "with_head": with_predictor, "bank": bank, "queries": queries}
    torch.save(inputs, tmp_path / "inputs.pt")
    run_ranks(evaluate_a_share, (tmp_path,), RANKS)
    for rank in range(RANKS):
        outputs = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(outputs["all"], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs["mine"], expected[rank::RANKS], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs["head"], heads, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs["kept"], expected_queries, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs["my_kept"], expected[rank::RANKS], atol=1e-5, rtol=1e-5)
        assert torch.equal(outputs["my_kept_labels"], labels[rank::RANKS])
        assert torch.equal(outputs["labels"], labels)
        assert torch.equal(outputs["my_labels"], labels[rank::RANKS])
        assert outputs["knn"] == pytest.approx(accuracies)


@pytest.mark.parametrize("kept_bytes", [2**29, 0])
def test_the_monitor_decodes_small_images_once_and_sees_the_same_again(kept_bytes, model, digits, monkeypatch):
    monkeypatch.setattr(monitor_module, "KEPT_BYTES", kept_bytes)
    bank, queries = digits
    watching = Monitor(model, KNNArguments(knn_k=[5], per_device_eval_batch_size=16), bank, queries)
    first = watching.look_at_features()
    decoded = []
    for images in digits:
        monkeypatch.setattr(images, "decode", lambda row, decode=images.decode: decoded.append(row) or decode(row))
    assert watching.look_at_features() == first
    assert len(decoded) == (0 if kept_bytes else len(bank) + len(queries))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"knn_k": [5, 5]}, r"knn_k \(\[5, 5\]\) has a number twice: name each once"),
        ({"knn_temperature": math.nan}, r"knn_temperature \(nan\) must be above 0"),
        ({"per_device_eval_batch_size": 0}, r"per_device_eval_batch_size \(0\) must be at least 1"),
        ({"dataloader_num_workers": -1}, r"dataloader_num_workers \(-1\) must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_encoded(settings, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        KNNArguments(**settings)
