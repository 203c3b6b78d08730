"""What is pushed to a Hub on this machine is loaded everywhere, by the true client."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import environment
from PIL import Image
from published_runs import model_of, push

from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoImageProcessorPil, MoCoModel
from training.hub.publish import list_files

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")  # and httpx2: the client's own use of them


# What a stranger does: no package of ours, an empty cache. Prints a line of JSON.
STRANGER = """
import sys
sys.modules["modeling_moco"] = sys.modules["training"] = None  # an import would raise
import json, timm, torch, transformers
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
image, found = Image.open(sys.argv[1]).convert("RGB"), {}
def logits(name, model, pixels):
    with torch.no_grad():
        outputs = model.eval()(pixels)
    found[name] = (outputs if isinstance(outputs, torch.Tensor) else outputs.logits)[0].tolist()
pixels = AutoImageProcessor.from_pretrained("org/probe")(image, return_tensors="pt").pixel_values
logits("TimmWrapper", AutoModelForImageClassification.from_pretrained("org/probe"), pixels)
remote = AutoModelForImageClassification.from_pretrained("org/probe", trust_remote_code=True)
found["remote class"] = type(remote).__module__
logits("remote code", remote, pixels)
model = timm.create_model("hf-hub:org/probe", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
logits("timm", model, transform(image)[None])
for name, trust in (("pipeline", None), ("remote pipeline", True)):
    classify = pipeline("image-classification", model="org/probe", trust_remote_code=trust, device="cpu")
    found[name] = {entry["label"]: entry["score"] for entry in classify(image, top_k=10)}
encoder = AutoModel.from_pretrained("org/run", trust_remote_code=True).eval()
pixels = AutoImageProcessor.from_pretrained("org/run", trust_remote_code=True)(image, return_tensors="pt").pixel_values
with torch.no_grad():
    found["features"] = encoder(pixels).pooler_output[0].tolist()
extract = pipeline("image-feature-extraction", model="org/run", device="cpu")
found["feature pipeline"] = extract(image, pool=True, return_tensors=True)[0].tolist()
small = AutoModel.from_pretrained("org/small", trust_remote_code=True)
found["small"] = type(small.encoder_q.maxpool).__name__
found["snapshot"] = snapshot_download("org/probe")
tuned = AutoModelForImageClassification.from_pretrained("org/probe", num_labels=3, ignore_mismatched_sizes=True)
tuned.save_pretrained("tuned"), AutoImageProcessor.from_pretrained("org/probe").save_pretrained("tuned")
logits("tuned", tuned, pixels)
again = AutoModelForImageClassification.from_pretrained("tuned", trust_remote_code=True)
pixels = AutoImageProcessor.from_pretrained("tuned", trust_remote_code=True)(image, return_tensors="pt").pixel_values
logits("tuned, remote code", again, pixels)
found["tuned class"] = type(again).__name__
again.save_pretrained("once more")
found["saved again"] = type(AutoModel.from_pretrained("once more", trust_remote_code=True)).__module__
try:
    AutoModel.from_pretrained("org/secret", trust_remote_code=True)
except OSError as error:
    found["secret"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_what_is_pushed_is_loaded_by_a_stranger_and_equals_ours(hub, run, script, tmp_path):
    small = tmp_path / "small"
    model = MoCoModel.from_pretrained(run)
    model.config.stem, model.encoder_q.maxpool = "no_max_pool", torch.nn.Identity()
    model.save_pretrained(small)
    MoCoImageProcessorPil.from_pretrained(run).save_pretrained(small)
    push(script, str(run), "org/run")
    push(script, str(run / "linear_probe"), "org/probe")
    push(script, str(small), "org/small")
    push(script, str(run), "org/secret", "--private")
    assert hub.repos["org/secret"].private

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "image.png")]
    env = environment(hub, tmp_path / "home")
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])

    classifier = MoCoForImageClassification.from_pretrained(run / "linear_probe").eval()
    pixels = MoCoImageProcessorPil.from_pretrained(run)(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = classifier(pixels).logits[0]
        features = model_of(run)(pixels).pooler_output[0]
    for name in ("TimmWrapper", "remote code", "timm"):
        assert found[name] == pytest.approx(logits.tolist(), abs=1e-6 * logits.abs().max().item()), name
    assert found["remote class"].startswith("transformers_modules.")
    expected = {str(i): p for i, p in enumerate(logits.softmax(dim=0).tolist())}
    for name in ("pipeline", "remote pipeline"):
        assert found[name] == pytest.approx(expected, rel=1e-4), name
    for name in ("features", "feature pipeline"):
        assert found[name] == pytest.approx(features.tolist(), abs=1e-6 * features.abs().max().item()), name
    assert found["small"] == "Identity"
    assert found["tuned, remote code"] == pytest.approx(found["tuned"], abs=1e-6)  # it was saved without our code
    assert found["tuned class"] == "MoCoForImageClassification"
    assert found["saved again"].startswith("transformers_modules.")
    assert set(list_files(Path(found["snapshot"]))) == set(hub.files("org/probe"))
    assert "401" in found["secret"] or "token" in found["secret"]


# The examples of a card, each with the first convolution of the model that it loads.
EXAMPLES = """
import re, sys
for block in re.findall(r"```python\\n(.*?)```", open(sys.argv[1]).read(), re.S):
    names = {}
    exec(block, names)
    model = names["model"] if "model" in names else names["pipe"].model
    print(next(x for name, x in model.state_dict().items() if name.endswith("conv1.weight")).double().sum().item())
"""


@pytest.mark.slow
def test_the_card_of_a_branch_loads_the_model_of_that_branch(hub, run, script, tmp_path):
    push(script, str(run / "checkpoint-4"), "org/run")
    push(script, str(run), "org/run", "--revision", "more-epochs")
    ends = [
        next(x for name, x in model_of(folder).state_dict().items() if name.endswith("conv1.weight")).double().sum()
        for folder in (run / "checkpoint-4", run)
    ]
    assert ends[0] != ends[1]
    Image.new("RGB", (40, 50)).save(tmp_path / "image.jpg")
    for branch, expected in zip(("main", "more-epochs"), ends, strict=True):
        (tmp_path / "README.md").write_bytes(hub.files("org/run", branch)["README.md"])
        result = subprocess.run(
            [sys.executable, "-c", EXAMPLES, "README.md"],
            capture_output=True,
            text=True,
            env=environment(hub, tmp_path / "home"),
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr
        assert list(map(float, result.stdout.split()[-4:])) == pytest.approx([expected.item()] * 4)


DOCTEST = """
import doctest, sys
flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
failed, tried = doctest.testfile(sys.argv[1], module_relative=False, optionflags=flags)
sys.exit(f"{failed} of {tried} failed" if failed or tried < 20 else 0)
"""


@pytest.mark.slow
def test_the_examples_of_the_documentation_run_as_printed(hub, script, tmp_path):
    torch.manual_seed(0)
    encoder = MoCoModel(MoCoConfig(queue_size=64))
    labels = {"id2label": {0: "not teal", 1: "teal"}, "label2id": {"not teal": 0, "teal": 1}}
    classifier = MoCoForImageClassification(MoCoConfig(**labels))
    classifier.classifier.weight.data.zero_()
    classifier.classifier.bias.data[1] = 3
    for name, model in (("moco-v2-r50", encoder), ("moco-v2-r50-in1k", classifier)):
        model.save_pretrained(tmp_path / name)
        MoCoImageProcessorPil().save_pretrained(tmp_path / name)
        push(script, str(tmp_path / name), f"org/{name}")
    command = [sys.executable, "-c", DOCTEST, str(ROOT / "docs" / "hub.md")]
    env = environment(hub, tmp_path / "home")
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


BACKBONE = """
import torch
{}
torch.manual_seed(0)
torch.save([stage for stage in backbone.eval()(torch.randn(1, 3, 64, 64)).feature_maps], "maps.pt")
"""


@pytest.mark.slow
def test_auto_backbone_gets_its_weights_from_the_hub(hub, script, tmp_path):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "AutoBackbone.from" in block)
    torch.manual_seed(1)
    model = MoCoModel(MoCoConfig(architecture="resnet18", queue_size=64)).eval()
    model.save_pretrained(tmp_path / "saved")
    MoCoImageProcessorPil().save_pretrained(tmp_path / "saved")
    push(script, str(tmp_path / "saved"), "org/moco-v2-r50")
    command = [sys.executable, "-c", BACKBONE.format(example)]
    env = environment(hub, tmp_path / "home")
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    torch.manual_seed(0)
    stages = model(torch.randn(1, 3, 64, 64), output_hidden_states=True).hidden_states
    for found, expected in zip(torch.load(tmp_path / "maps.pt"), stages[-3:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
