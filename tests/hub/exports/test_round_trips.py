"""What was published comes back: with its training state, published again, fine-tuned by a stranger."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from exported_models import SIZE, images, ours, published, saved
from tiny_models import assert_equal, moco_config
from transformers import AutoModelForImageClassification

from modeling_moco import MoCoForImageClassification, MoCoImageProcessorPil, MoCoModel
from training.hub import exports
from training.hub.publish import list_files, load_published


def test_training_state_travels_when_asked_for(tmp_path):
    model = saved(tmp_path / "saved", "test_resnet", "encoder")
    model.dictionary.enqueue(torch.nn.functional.normalize(torch.randn(8, 16)))
    model.save_pretrained(tmp_path / "saved")
    alone = published(tmp_path / "saved", tmp_path / "alone")
    whole = published(tmp_path / "saved", tmp_path / "whole", include_training_state=True)
    assert_equal(MoCoModel.from_pretrained(whole).state_dict(), model.state_dict())
    assert set(exports.read_written(whole / "config.json")) == set(exports.read_written(alone / "config.json"))
    fresh = MoCoModel.from_pretrained(alone)
    assert_equal(fresh.encoder_q.state_dict(), model.encoder_q.state_dict())
    assert fresh.dictionary.queue_ptr.item() == 0
    assert timm.create_model(f"local-dir:{whole}", pretrained=True).num_classes == 0


def test_training_state_that_is_not_there_is_not_made_up(tmp_path):
    saved(tmp_path / "saved", "test_resnet", "encoder")
    alone = published(tmp_path / "saved", tmp_path / "alone")
    with pytest.raises(ValueError, match=r"lacks dictionary\.queue"):
        load_published(str(alone), training_state=True)
    saved(tmp_path / "probe", "test_resnet", "classifier")
    with pytest.raises(ValueError, match="is for encoders"):
        load_published(str(tmp_path / "probe"), training_state=True)


def test_a_model_without_image_processor_or_weights_is_refused(tmp_path):
    model = saved(tmp_path / "saved", "test_resnet", "encoder")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no MoCo model with its image processor"):
        load_published(str(tmp_path / "bare"), training_state=False)
    with pytest.raises(ValueError, match="pass the folder that a run saved to"):
        load_published(str(tmp_path), training_state=False)


def test_what_was_published_can_be_saved_and_published_again(tmp_path):
    model = saved(tmp_path / "saved", "test_resnet", "classifier")
    folder = published(tmp_path / "saved", tmp_path / "published")
    again = published(folder, tmp_path / "again")
    for name in list_files(folder):
        if name != "config.json":  # whose keys come in another order
            assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    assert exports.read_written(again / "config.json") == exports.read_written(folder / "config.json")
    MoCoForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    assert exports.read_written(tmp_path / "ours" / "config.json")["model_type"] == "moco"
    back = MoCoForImageClassification.from_pretrained(tmp_path / "ours")
    assert_equal(back.state_dict(), model.state_dict())


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_what_was_saved_as_a_timm_wrapper_is_ours_again(architecture, kind, tmp_path):
    size = {"model_args": {"img_size": SIZE}} if architecture == "test_vit" else {}
    saved(tmp_path / "saved", architecture, kind, **size)
    folder = published(tmp_path / "saved", tmp_path / "published")
    new = {i: f"new {i}" for i in range(7)}
    labels = {"num_labels": 7, "id2label": new, "label2id": {name: i for i, name in new.items()}}
    wrapper = AutoModelForImageClassification.from_pretrained(folder, problem_type="regression", **labels).eval()
    wrapper.timm_model.get_classifier().bias.data.normal_()
    wrapper.to(torch.bfloat16).save_pretrained(tmp_path / "tuned")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert again.config.id2label == new
    again.save_pretrained(tmp_path / "again")
    code = exports.read_written(folder / "config.json")[
        "auto_map"
    ]  # beside it; of what is saved without it, in the repository
    for name in ("tuned", "again"):
        named = {kind: f"org/name--{place}" for kind, place in code.items()}
        assert exports.read_written(tmp_path / name / "config.json")["auto_map"] == named

    model = MoCoForImageClassification.from_pretrained(tmp_path / "tuned").eval()
    assert (model.config.id2label, model.config.problem_type) == (new, "regression")
    assert model.dtype == torch.bfloat16
    pixels = torch.randn(2, 3, SIZE, SIZE, dtype=torch.bfloat16)
    torch.testing.assert_close(model(pixels).logits, wrapper(pixels).logits)
    network = timm.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True).eval().to(torch.bfloat16)
    torch.testing.assert_close(network(pixels), wrapper(pixels).logits)
    assert network.pretrained_cfg["label_names"] == [*new.values()]
    processor = MoCoImageProcessorPil.from_pretrained(tmp_path / "tuned")
    assert processor.to_dict() == MoCoImageProcessorPil.from_pretrained(folder).to_dict()

    model.save_pretrained(tmp_path / "ours")  # in names of ours, and without a word of code that does not lie there
    assert not hasattr(model.config, "auto_map")
    again = MoCoForImageClassification.from_pretrained(tmp_path / "ours")
    assert_equal(again.state_dict(), model.state_dict())
    encoder = MoCoModel.from_pretrained(tmp_path / "tuned", momentum_encoder=False)
    assert_equal(encoder.state_dict(), model.moco.state_dict())
    assert "classifier" not in str(encoder.absent_keys)


def test_as_many_classes_as_imagenet_have_their_own_names(tmp_path):
    names = {i: f"own {i}" for i in range(1000)}
    torch.manual_seed(0)
    config = moco_config("test_resnet", id2label=names, label2id={name: i for i, name in names.items()})
    MoCoForImageClassification(config).save_pretrained(tmp_path / "saved")
    MoCoImageProcessorPil().save_pretrained(tmp_path / "saved")
    folder = published(tmp_path / "saved", tmp_path / "published")
    assert AutoModelForImageClassification.from_pretrained(folder).config.id2label == names
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg["label_names"] == [*names.values()]


def test_the_names_of_the_newest_classes_are_saved_without_our_code(tmp_path):
    saved(tmp_path / "saved", "test_resnet", "classifier")
    folder = published(tmp_path / "saved", tmp_path / "published")
    for classes in (1000, 7, 1000, 2):  # as many as ImageNet has, and as many as the model before
        names = {i: f"{folder.name} {i}" for i in range(classes)}
        labels = {"num_labels": classes, "id2label": names, "label2id": {name: i for i, name in names.items()}}
        tuned = AutoModelForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **labels)
        folder = folder.with_name(f"{folder.name} and {classes}")
        tuned.save_pretrained(folder)
        for loaded in (AutoModelForImageClassification, MoCoForImageClassification):
            assert loaded.from_pretrained(folder).config.id2label == names


# A line for each way back: the folder, whether its code is trusted, and the same logits.
TUNE = """
import sys
sys.modules["modeling_moco"] = sys.modules["training"] = None  # a stranger has no package of ours
import json, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
source, target, trust, image = sys.argv[1], sys.argv[2], sys.argv[3] == "trust", Image.open(sys.argv[4])
trusted = {"trust_remote_code": True} if trust else {}
kinds = {"num_labels": 3, "ignore_mismatched_sizes": True, **trusted}
model, processor = AutoModelForImageClassification.from_pretrained(source, **kinds), None
processor = AutoImageProcessor.from_pretrained(source, **trusted)
pixels = processor(image, return_tensors="pt").pixel_values
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
model.train()(torch.cat([pixels, -pixels]), labels=torch.tensor([0, 2])).loss.backward()
optimizer.step()
model.save_pretrained(target), processor.save_pretrained(target)
with torch.no_grad():
    logits = model.eval()(pixels).logits[0]
    again = AutoModelForImageClassification.from_pretrained(target, **trusted).eval()
    pixels = AutoImageProcessor.from_pretrained(target, **trusted)(image, return_tensors="pt").pixel_values
    found = {"kind": type(again).__name__, "reloaded": again(pixels).logits[0].tolist()}
    scores = pipeline("image-classification", model=target, device="cpu", **trusted)(image, top_k=3)
found |= {"tuned": logits.tolist(), "probabilities": logits.softmax(dim=0).tolist()}
print(json.dumps(found | {"scores": {entry["label"]: entry["score"] for entry in scores}}))
"""


CLASSIFY = """
import sys
sys.modules["modeling_moco"] = sys.modules["training"] = None
import json
from PIL import Image
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], device="cpu", trust_remote_code=True)
assert type(classify.model).__name__ == "MoCoForImageClassification", type(classify.model)
print(json.dumps({entry["label"]: entry["score"] for entry in classify(Image.open(sys.argv[2]), top_k=3)}))
"""


def assert_same_logits(folder, logits, tmp_path):
    """Of our package's model and image processor, and of what is published of them."""
    model = MoCoForImageClassification.from_pretrained(folder).eval()
    pixels = MoCoImageProcessorPil.from_pretrained(folder)(images()[2], return_tensors="pt").pixel_values
    assert ours(model, pixels)[0].tolist() == pytest.approx(logits, abs=1e-6)
    again = published(folder, tmp_path / "again")
    torch.testing.assert_close(
        ours(MoCoForImageClassification.from_pretrained(again).eval(), pixels), ours(model, pixels)
    )


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["trust", "no trust"])
def test_what_is_fine_tuned_by_a_stranger_and_saved_loads_again(resnet, trust, tmp_path):
    images()[2].save(tmp_path / "image.png")
    target = tmp_path / "tuned"
    command = [
        sys.executable,
        "-W",
        "default",
        "-c",
        TUNE,
        str(resnet[2]),
        str(target),
        trust,
        str(tmp_path / "image.png"),
    ]
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["kind"] == ("MoCo" if trust == "trust" else "TimmWrapper") + "ForImageClassification"
    assert found["reloaded"] == pytest.approx(found["tuned"], abs=1e-6)
    assert found["scores"] == pytest.approx({f"LABEL_{i}": p for i, p in enumerate(found["probabilities"])}, rel=1e-4)
    assert_same_logits(target, found["tuned"], tmp_path)  # and with our package, with which it can be published again
    if trust == "no trust":  # and with the code of the repository, which here is a folder of its name
        (tmp_path / "org").mkdir()
        (tmp_path / "org" / "name").symlink_to(resnet[2])
        command[3:] = ["-c", CLASSIFY, str(target), str(tmp_path / "image.png")]
        result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx(found["scores"], rel=1e-4)
