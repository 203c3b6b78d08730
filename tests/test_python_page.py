"""The examples of docs/python.md run, and do what they say."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import assert_equal
from torch.nn import functional as F

from modeling_moco import MoCoImageProcessor, MoCoModel
from training.data.images import MapImages
from training.data.pipeline import training_views
from training.evaluation.encoder import Encoder
from training.hub.publish import PublishArguments, load_published, publish
from training.recipe import parse_pretrain
from training.views.policy import POLICIES, ViewPolicy, register_policy

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
# What makes an example of hours one of seconds.
SMALLER = {
    **{"resnet18": "test_resnet", "resnet50": "test_resnet", "4096": "64", "224": "32", "256": "36"},
    **{"num_train_epochs=100": "num_train_epochs=1, logging_steps=1, disable_tqdm=True", "=128": "=16"},
    "num_train_epochs=20": "max_steps=2, logging_steps=1, disable_tqdm=True",
    'batch_norm="split")': 'batch_norm="split", batch_norm_splits=2)',
    "num_labels=3": "num_labels=3, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, "
    "decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5",
}
MOST_LINES = 15


def examples(section: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.S)
    for old, new in SMALLER.items():
        found = [example.replace(old, new) for example in found]
    return found


def run(example: str, names: dict) -> dict:
    exec(compile(example, "docs/python.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 44, 3), dtype=np.uint8)
    return [Image.fromarray(x) for x in pixels]


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """The folder in which the first example has run, and its names."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        return folder, run(examples("Train")[0], {"pictures": pictures})


@pytest.fixture
def user(trained, monkeypatch):
    """The names of the first example, in its folder."""
    folder, names = trained
    monkeypatch.chdir(folder)
    return dict(names)


def test_every_example_has_few_lines():
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        assert len([line for line in example.splitlines() if line]) < MOST_LINES, example


def test_training_leaves_a_model(trained):
    folder, names = trained
    assert names["trainer"].state.global_step == 2  # 40 images in batches of 16
    assert_equal(MoCoModel.from_pretrained(folder / "runs/mine").state_dict(), names["model"].state_dict())
    assert MoCoImageProcessor.from_pretrained(folder / "runs/mine").crop_size["height"] == 32


def test_a_torch_dataset_has_the_same_views(user, pictures):
    for i, picture in enumerate(pictures[:17]):
        Path("photographs/a").mkdir(parents=True, exist_ok=True)
        picture.save(f"photographs/a/{i:02}.png")
    own = run(examples("Train")[1], dict(user))["trainer"].train_dataset
    for name, view in user["trainer"].train_dataset[3].items():
        assert torch.equal(own[3][name], view)


def test_own_views_come_from_the_generator_alone(user):
    names = run(examples("One's own views")[0], user)
    images = names["trainer"].train_dataset
    first = images[3]
    assert first["pixel_values"].shape == (3, 32, 32)
    assert not torch.equal(first["pixel_values"], first["key_pixel_values"])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = MapImages(images.source, images.transform, images.seed, images.decode)[3]
    assert torch.equal(torch.get_rng_state(), state)
    for name, x in first.items():
        assert torch.equal(again[name], x)
    images.set_epoch(1)
    assert not torch.equal(images[3]["pixel_values"], first["pixel_values"])


def test_what_is_no_view_of_the_run_is_refused_before_it_begins(user):
    def refused(images, view):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            user["MoCoTrainer"](user["model"], user["args"], images, user["processor"], view=view)
        return str(error.value)

    images = user["images"]
    assert refused(images, lambda *_: torch.zeros(32, 32)).startswith(
        "view makes (32, 32) of an image: return a tensor"
    )
    assert refused(images, lambda image, _: image).startswith("view makes Image of an image: return a tensor")
    assert refused(images, lambda *_: torch.zeros(3, 32, 24)).startswith(
        "view makes 32 x 24 px, but the image processor"
    )
    assert "makes its own views" in refused(user["trainer"].train_dataset, lambda *_: torch.zeros(3, 32, 32))


@pytest.fixture
def policies(monkeypatch):
    """The policies, which a test may add to."""
    monkeypatch.setattr("training.views.policy.POLICIES", dict(POLICIES))


def gentle(user) -> str:
    (text,) = re.findall(r"```yaml\n(.*?)```", SECTIONS["A view policy in a recipe"], re.S)
    Path("gentle.yaml").write_text(
        text.replace("knn_k", "max_steps: 4\n  use_cpu: true\n  disable_tqdm: true\n  knn_k")
    )
    return examples("A view policy in a recipe")[0]


def test_a_registered_policy_has_a_name_in_recipes(user, policies):
    example = gentle(user)
    with pytest.raises(
        ValueError,
        match=r"augmentation \('gentle'\) is unknown: choose one of v1, v2, cifar, crop, v3, simclr, simclr_cifar, or call",
    ):
        parse_pretrain(["--recipe", "gentle.yaml"])
    started: list = []
    run(example.replace("from training.commands import run\n", ""), {"run": lambda *words: started.append(words)})
    ((command, argv),) = started
    assert command == "pretrain"
    policies = training_views(parse_pretrain([*argv, "--view_backend", "cv2"]).data).policies
    assert policies == (ViewPolicy(min_scale=0.5, jitter=(0.2, 0.2, 0.2, 0.05), blur_p=0.5),) * 2
    with pytest.raises(ValueError, match=r"augmentation \('gentle'\) is registered already"):
        register_policy("gentle", ViewPolicy())


@pytest.mark.slow
def test_a_run_with_a_registered_policy_trains_and_is_evaluated_without_it(user, policies, script):
    run(gentle(user), {})
    assert Path("runs/gentle/tsne.png").is_file()
    assert "augmentation: gentle" in Path("runs/gentle/recipe.yaml").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.views.policy.POLICIES", dict(POLICIES))
        script("report").main(["runs/gentle"])
        script("knn").main(["runs/gentle", "--use_cpu", "--knn_k", "3"])
    assert "weighted kNN, k 3" in Path("runs/gentle/results.json").read_text()


def test_an_own_dictionary_is_built_saved_and_loaded_by_its_name(user, tmp_path, monkeypatch):
    from modeling_moco.dictionary_moco import DICTIONARIES

    monkeypatch.setitem(DICTIONARIES, "queue", DICTIONARIES["queue"])
    names = run(examples("One's own dictionary")[0], user)
    model = names["model"]
    keys = F.normalize(torch.randn(8, 128))
    model.dictionary.enqueue(keys)
    assert torch.equal(model.dictionary.queue[:, :4], keys[::2].T)
    assert model.dictionary.queue_ptr.item() == 4
    model.save_pretrained(tmp_path)
    assert_equal(MoCoModel.from_pretrained(tmp_path).state_dict(), model.state_dict())
    DICTIONARIES.pop("sparse")
    with pytest.raises(
        ValueError,
        match="dictionary \\('sparse'\\) is none of queue, batch, batch_both_views, bank: call register_dictionary first",
    ):
        MoCoModel.from_pretrained(tmp_path)
    names["processor"].save_pretrained(tmp_path)
    alone, processor = load_published(str(tmp_path), training_state=False)
    publish(str(tmp_path), alone, processor, "org/name", PublishArguments(), tmp_path / "published")
    x = torch.randn(2, 3, 32, 32)
    for there in (
        MoCoModel.from_pretrained(tmp_path, momentum_encoder=False),
        MoCoModel.from_pretrained(tmp_path / "published"),
        Encoder(str(tmp_path)).load(MoCoModel, seed=0),
    ):
        torch.testing.assert_close(there.eval()(x).pooler_output, model.eval()(x).pooler_output)


def test_features_are_those_of_the_model_image_by_image(user, pictures):
    features = run(examples("Features")[0], user)["features"]
    processor, model = user["processor"], MoCoModel.from_pretrained("runs/mine").eval()
    with torch.no_grad():
        alone = [model(**processor(picture, return_tensors="pt")).pooler_output for picture in pictures]
    torch.testing.assert_close(features, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_training_continues_from_published_weights(user):
    MoCoModel.from_pretrained("runs/mine", momentum_encoder=False).save_pretrained("org/moco-v2-r50")
    user["processor"].save_pretrained("org/moco-v2-r50")
    before = MoCoModel.from_pretrained("org/moco-v2-r50").state_dict()
    names = run(examples("Continue from weights of the Hub")[0], user)
    model = names["model"]
    assert names["trainer"].state.global_step == 2
    expected = MoCoModel.from_pretrained("runs/mine").state_dict()
    for name, tensor in before.items():
        if name.startswith("encoder_q."):
            assert torch.equal(tensor, expected[name])
    assert not torch.equal(model.encoder_q.layer1[0].conv1.weight, before["encoder_q.layer1.0.conv1.weight"])


def test_timm_weights_come_into_a_model_of_own_settings(user):
    import timm

    encoder = timm.create_model("test_resnet", num_classes=0)
    timm.models.save_for_hf(encoder, "timm/resnet50.a1_in1k", safe_serialization=True)
    Path("timm/test_resnet.a1_in1k").exists() or Path("timm/resnet50.a1_in1k").rename("timm/test_resnet.a1_in1k")
    names = run(examples("Continue from weights of the Hub")[1], user)
    assert_equal(names["model"].encoder_q.state_dict(), encoder.state_dict())
    assert "the projector is new" in names["start"].notes


def test_a_detector_has_the_pretrained_backbone_and_comes_back(user):
    names = run("import torch\n" + examples("A backbone")[0], user)
    x = torch.randn(2, 3, 64, 64)
    stages = MoCoModel.from_pretrained("runs/mine").eval()(x, output_hidden_states=True).hidden_states
    found = names["backbone"].eval()(x).feature_maps
    assert [tuple(stage.shape[2:]) for stage in found] == [(8, 8), (4, 4), (2, 2)]
    for stage, expected in zip(found, stages[-3:], strict=True):
        torch.testing.assert_close(stage, expected)
    names = run(examples("A detector")[0], names)
    detector, again = names["detector"], names["again"].eval()
    inner = detector.model.backbone.model
    torch.testing.assert_close(inner(x).feature_maps[0], stages[-1], rtol=1e-3, atol=1e-4)
    frozen = {name: x.clone() for name, x in inner.named_buffers()}
    assert any(name.endswith("bn1.weight") for name in frozen)  # parameters of BatchNorm that does train
    for name, tensor in detector.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(again(x).logits, detector.eval()(x).logits)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}] * 2
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.1)
    before = inner.encoder_q.layer4[0].conv1.weight.clone()
    detector.train()(x, labels=labels).loss.backward()
    optimizer.step()
    assert not torch.equal(inner.encoder_q.layer4[0].conv1.weight, before)
    for name, tensor in inner.named_buffers():
        assert torch.equal(tensor, frozen[name]), name
