"""Probes on kept features: many heads against each alone, L-BFGS against scikit-learn, and what is chosen by what."""

import datasets
import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from modeling_moco import MoCoConfig, MoCoForImageClassification
from training.data.images import MapImages
from training.data.sources import DataArguments, ImageSplits, load_images
from training.evaluation import cached_probe
from training.evaluation.cached_probe import (
    Heads,
    build_cached,
    class_logits,
    converged,
    regularisation_path,
    train_heads,
)
from training.evaluation.features import cached_features
from training.evaluation.probe_arguments import LinearProbeArguments
from training.evaluation.probe_results import hold_out

WIDTH, CLASSES = 8, 4


@pytest.fixture(scope="module")
def clusters():
    """Overlapping clusters: features (300, D) and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (300,), generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    return 2 + centres[labels] + torch.randn(300, WIDTH, generator=generator), labels


def test_every_head_is_a_linear_layer_trained_alone_by_torchs_sgd(clusters):
    features, labels = clusters
    rates = [0.01, 0.5, 3.0]
    heads = Heads(WIDTH, CLASSES, len(rates), seed=0)
    layers = []
    for i in range(len(rates)):
        layer = nn.Linear(WIDTH, CLASSES)
        layer.weight.data = heads.weight.detach().unflatten(1, heads.shape)[:, i].T.clone()
        nn.init.zeros_(layer.bias)
        layers.append(layer)
    assert torch.equal(layers[0].weight, layers[2].weight)
    assert heads.weight.std().item() == pytest.approx(0.01, rel=0.3)

    epochs = list(train_heads(heads, features, labels, rates, epochs=5, milestones=[2, 4], batch_size=64, seed=3))
    assert epochs == [1, 2, 3, 4, 5]
    for i, (layer, rate) in enumerate(zip(layers, rates, strict=True)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
        order = torch.Generator().manual_seed(3)
        for _ in range(5):
            for rows in torch.randperm(300, generator=order).split(64):  # the last batch is smaller
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(features[rows]), labels[rows]).backward()
                optimizer.step()
            schedule.step()
        torch.testing.assert_close(heads(features)[:, i], layer(features), atol=1e-4, rtol=1e-4)
        expected = 100 * (layer(features).argmax(dim=1) == labels).double().mean().item()
        assert heads.top1(features, labels)[i] == pytest.approx(expected)
        assert heads.scores(features, labels, i).top1 == pytest.approx(expected)


def test_the_regularisation_path_is_separately_fitted_models(clusters, monkeypatch):
    features, labels = clusters[0].double().numpy(), clusters[1].numpy()
    monkeypatch.setattr(cached_probe, "TOLERANCE", 1e-8)
    strengths = [1e-3, 0.1, 10.0]
    for strength, model in zip(strengths, regularisation_path(features, labels, strengths), strict=True):
        classifier = LogisticRegression(C=strength, tol=1e-8, max_iter=1000)
        alone = make_pipeline(StandardScaler(), classifier).fit(features, labels)
        assert converged(model)
        np.testing.assert_allclose(model.predict_proba(features), alone.predict_proba(features), atol=1e-5)


@pytest.mark.parametrize("present", [[0, 1, 2, 3], [0, 3], [1, 2, 3]])
def test_logits_answer_as_scikit_learn_does_whatever_classes_it_has_seen(clusters, present):
    seen = torch.isin(clusters[1], torch.tensor(present))
    features, labels = clusters[0][seen].numpy(), clusters[1][seen].numpy()
    (model,) = regularisation_path(features, labels, [1.0])
    logits = class_logits(model, features, CLASSES)
    assert logits.shape == (len(labels), CLASSES)
    assert logits.argmax(dim=1).tolist() == model.predict(features).tolist()
    assert logits.topk(len(present), dim=1).indices.unique().tolist() == present


def test_a_fit_that_did_not_converge_says_so(clusters, monkeypatch):
    monkeypatch.setattr(cached_probe, "MAX_ITER", 2)
    with pytest.warns(ConvergenceWarning):
        (model,) = regularisation_path(clusters[0].numpy(), clusters[1].numpy(), [10.0])
    assert not converged(model)


# From images


@pytest.fixture(scope="module")
def digits():
    data = DataArguments(
        dataset_name="digits", image_size=32, eval_resize=32, max_train_samples=400, max_eval_samples=150
    )
    torch.manual_seed(0)
    config = MoCoConfig(architecture="test_resnet", id2label=dict(enumerate("0123456789")))
    return MoCoForImageClassification(config).eval(), data, load_images(data, labelled=True)


def arguments(folder, **kwargs) -> LinearProbeArguments:
    values = {"num_train_epochs": 10, "lr_milestones": [6, 8], "learning_rates": [0.1, 1.0, 3.0]} | kwargs
    return LinearProbeArguments(output_dir=str(folder), use_cpu=True, mode="cached", **values)


def test_accuracies_are_those_of_the_kept_features(digits, tmp_path):
    model, data, splits = digits
    sgd, lbfgs = build_cached(model, arguments(tmp_path), data, splits, tmp_path / "features")
    parts = (MapImages(split, data.evaluation_view()) for split in (splits.train, splits.eval))
    (x, y), (q, truth) = (cached_features(model.moco, images, tmp_path / "features") for images in parts)
    kept, held = hold_out(y, seed=0)
    assert len(list((tmp_path / "features").iterdir())) == 2

    assert lbfgs.name == "cached L-BFGS"
    assert "standardised" in lbfgs.protocol
    for head, strength in zip(lbfgs.heads, cached_probe.STRENGTHS, strict=True):
        alone = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-5, max_iter=1000))
        alone.fit(x[kept].numpy(), y[kept].numpy())
        assert head.setting == f"C {strength:g}"
        assert head.held_out == pytest.approx(100 * alone.score(x[held].numpy(), y[held].numpy()), abs=3)
        assert head.last == pytest.approx(100 * alone.score(q.numpy(), truth.numpy()), abs=1.5)
    best = max(lbfgs.heads, key=lambda head: head.held_out)
    assert lbfgs.final.setting == best.setting
    again = make_pipeline(StandardScaler(), LogisticRegression(C=float(best.setting[2:]), tol=1e-5, max_iter=1000))
    again.fit(x.numpy(), y.numpy())
    assert lbfgs.scores.top1 == pytest.approx(100 * again.score(q.numpy(), truth.numpy()))

    assert sgd.name == "cached SGD"
    assert sgd.protocol == (
        "linear probe, cached features, SGD, learning rate 0.1 1 3 by a held-out tenth, 10 epochs, a tenth at 6 8, batch 256"
    )
    best = max(sgd.heads, key=lambda head: head.held_out)
    assert sgd.final.setting == best.setting
    assert sgd.trained_on == lbfgs.trained_on == 400
    assert sgd.scores.top1 == sgd.final.last <= sgd.final.best
    heads = Heads(x.shape[1], 10, 1, seed=0)
    *_, _ = train_heads(heads, x, y, [float(best.setting.removeprefix("learning rate "))], epochs=10, milestones=[6, 8])
    assert sgd.scores.top1 == pytest.approx(heads.top1(q, truth)[0])
    assert sgd.scores.top1 > 60


def test_features_are_found_again_and_one_rate_needs_no_choice(digits, tmp_path, monkeypatch):
    model, data, splits = digits
    first, _ = build_cached(model, arguments(tmp_path, learning_rates=[1.0]), data, splits, tmp_path / "features")
    assert first.heads == []
    assert first.final.setting == "learning rate 1"
    assert "held-out" not in first.protocol

    def fail(*args, **kwargs):
        raise AssertionError("extracted again")

    monkeypatch.setattr("training.evaluation.features.extract_features", fail)
    again, _ = build_cached(model, arguments(tmp_path, learning_rates=[1.0]), data, splits, tmp_path / "features")
    assert again.final == first.final


def test_the_evaluated_images_do_not_choose(digits, tmp_path):
    # Every evaluated image has its neighbour class's label: the better a setting is, the worse it looks there.
    model, data, splits = digits
    rows = splits.eval.map(lambda row: {"label": (row["label"] + 1) % 10}, features=splits.eval.features)
    wrong = ImageSplits(splits.train, datasets.Dataset.from_list(rows.to_list(), rows.features), splits.class_names)
    rates = [1e-9, 1.0]
    right, deceived = (
        list(build_cached(model, arguments(tmp_path, learning_rates=rates), data, x, tmp_path / "features"))
        for x in (splits, wrong)
    )
    for honest, probe in zip(right, deceived, strict=True):
        assert probe.final.setting == honest.final.setting
        assert [head.held_out for head in probe.heads] == [head.held_out for head in honest.heads]
        assert probe.final.last < 10
    assert deceived[0].final.setting == "learning rate 1"
    assert deceived[0].heads[0].last > deceived[0].heads[1].last
