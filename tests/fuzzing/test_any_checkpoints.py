"""Mutated checkpoints and model directories are read, or refused in one line."""

import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from bombs import memory_for
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import anything, edited, edits, few, mutated_bytes, mutated_json, refusal, texts
from safetensors.torch import load_file
from tiny_models import moco_config

from modeling_moco import MoCoModel
from modeling_moco.encoder_moco import build_encoder
from training.convert.files import read
from training.evaluation.encoder import Encoder


def official_state() -> dict[str, torch.Tensor]:
    """The tensors of main_moco.py for a ResNet-18, which share one memory, so that the file is small."""
    with torch.device("meta"):
        encoder = build_encoder(moco_config("resnet18")).state_dict()
    shapes = {name: tensor.shape for name, tensor in encoder.items()} | {"fc.weight": (16, 512), "fc.bias": (16,)}
    memory, steps = torch.zeros(512 * 512 * 9, dtype=torch.float16), torch.zeros((), dtype=torch.int64)
    state = {"queue": memory[: 16 * 32].view(16, 32), "queue_ptr": torch.zeros(1, dtype=torch.int64)}
    for name, shape in shapes.items():
        tensor = steps if name.endswith("tracked") else memory[: int(np.prod(shape))].view(shape)
        state[f"encoder_q.{name}"] = tensor
    return {f"module.{name}": tensor for name, tensor in state.items()}


STATE = official_state()
HEADS = ["module.encoder_q.fc.weight", "module.encoder_q.fc.bias", "module.queue", "module.queue_ptr"]
sizes = st.sampled_from([0, 1, 2, 3, 16, 32, 10**4, 10**11, 2**40])
tensors = st.builds(
    lambda shape, kind: torch.zeros((), dtype=kind).expand(shape),
    st.lists(sizes, max_size=3).filter(lambda shape: np.prod([float(n) for n in shape]) < 2**60),
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8]),
)
values = (
    tensors
    | anything
    | st.sampled_from(
        [torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), torch.tensor(float("nan")), torch.tensor(1.5)]
    )
)
of_file = st.dictionaries(
    st.sampled_from(["epoch", "arch", "best_acc1", "optimizer", "state_dict", "student", 7, ("a",), "x\ny"]),
    values,
    max_size=3,
)
of_state = st.dictionaries(
    st.sampled_from(
        [*HEADS, "module.encoder_q.conv1.weight", "module.x\n", "conv1.weight", "module.fc.weight", 3, "module."]
    )
    | texts,
    values | st.just("left out"),
    max_size=3,
)


@few
@example(around={}, changes={}, edits=[])
@example(around={"epoch": 10**400}, changes={}, edits=[])
@example(around={}, changes={"module.queue": torch.zeros(()).expand(16, 10**11)}, edits=[])
@given(around=of_file, changes=of_state, edits=st.just([]) | edits)
def test_a_checkpoint_of_other_code_is_read_or_refused(place, around, changes, edits):
    state = {name: tensor for name, tensor in (STATE | changes).items() if not isinstance(tensor, str)}
    with place() as folder:
        path = folder / "checkpoint.pth.tar"
        with suppress(UnicodeEncodeError):  # torch cannot save some names
            torch.save({"epoch": 3, "arch": "resnet18", "state_dict": state} | around, path)
            path.write_bytes(edited(path.read_bytes(), edits))
            checkpoint = []
            if refusal(lambda: checkpoint.append(read(str(path))), path) is None:
                assert str(checkpoint[0]).isprintable()
                assert all(note.isprintable() for note in checkpoint[0].notes)


RECORD = Path(__file__).parents[1] / "records" / "detectron2_r50c4_tiny_step.safetensors"
DETECTOR = {n.removeprefix("weights."): x for n, x in load_file(RECORD).items() if n.startswith("weights.")}
of_detectron2 = [
    *("backbone.stem.conv1.weight", "backbone.res2.0.conv3.weight", "roi_heads.res5.0.conv3.weight"),
    *("roi_heads.res5.norm.weight", "roi_heads.box_predictor.cls_score.weight", "pixel_mean"),
    *("roi_heads.box_predictor.cls_score.bias", "roi_heads.box_predictor.bbox_pred.weight"),
    *("roi_heads.mask_head.predictor.weight", "proposal_generator.rpn_head.objectness_logits.weight"),
    "proposal_generator.anchor_generator.cell_anchors.0",
]


@few
@example(changes={}, edits=[])
@example(changes={"roi_heads.box_predictor.cls_score.bias": torch.zeros(10**11, 0)}, edits=[])
@example(changes={"roi_heads.res5.0.conv3.weight": torch.zeros(10**11, 0)}, edits=[])
@given(
    changes=st.dictionaries(st.sampled_from(of_detectron2), values | st.just("left out"), max_size=3),
    edits=st.just([]) | edits,
)
def test_a_detector_of_detectron2_is_read_or_refused(place, changes, edits):
    state = {name: tensor for name, tensor in (DETECTOR | changes).items() if not isinstance(tensor, str)}
    with place() as folder:
        path = folder / "model_final.pth"
        torch.save({"model": state, "iteration": 3}, path)
        path.write_bytes(edited(path.read_bytes(), edits))
        with memory_for(2000 * 2**20):
            refusal(lambda: read(str(path)), path)


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    """The files of a saved model of this project, by name."""
    folder = tmp_path_factory.mktemp("model")
    MoCoModel(moco_config()).save_pretrained(folder)
    (folder / "conversion.json").write_text(json.dumps({"format": "official MoCo", "epoch": 3, "prefix": ""}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore")
@few
@given(data=st.data(), name=st.sampled_from(["config.json", "conversion.json", "model.safetensors"]))
def test_a_model_directory_is_read_or_refused(place, model_files, data, name):
    whole = model_files[name]
    mutated = mutated_bytes([whole]) if name.endswith("safetensors") else mutated_json(json.loads(whole))
    files = model_files | {name: data.draw(mutated)}
    with place() as folder:
        for file, content in files.items():
            (folder / file).write_bytes(content)
        for call in (read, lambda source: Encoder(source).load(MoCoModel, seed=0)):
            with memory_for(2000 * 2**20):
                refusal(partial(call, str(folder)), folder)


whole_numbers = st.sampled_from([0, 1, -1, 64, 10**4, 10**10, 10**13, 2**63, 10**30])
names = st.sampled_from(["evil/x", "../private", "sdpa", "PRIVATE", "resnet18", "float16", "load"]) | texts
settings_of_config = st.dictionaries(
    st.sampled_from(
        [
            *(
                "queue_size",
                "projection_dim",
                "num_labels",
                "architecture",
                "model_args",
                "quantization_config",
                "dtype",
            ),
            *("_attn_implementation", "attn_implementation", "transformers_weights", "auto_map", "id2label", "moco"),
        ]
    ),
    anything | whole_numbers | names | st.dictionaries(names | st.just("depth"), whole_numbers | names, max_size=2),
    min_size=1,
    max_size=2,
)


@pytest.mark.filterwarnings("ignore")
@few
@given(changes=settings_of_config)
@example(changes={"num_labels": 10**13})
@example(changes={"model_args": {"layers": [float("nan"), 10**9]}})
@example(changes={"model_args": {"checkpoint_path": "/etc/hostname"}})
@example(changes={"dtype": "load"})
@example(changes={"dtype": 0})
@example(changes={"moco": 7})
@example(changes={"transformers_weights": 0})
@example(changes={"temperature": {"": 10**4000}})
def test_a_hostile_config_is_used_or_refused(place, model_files, changes):
    with suppress(UnicodeEncodeError), place() as folder:
        config = json.dumps(json.loads(model_files["config.json"]) | changes).encode()
        for file, content in (model_files | {"config.json": config}).items():
            (folder / file).write_bytes(content)
        for call in (read, lambda source: Encoder(source).load(MoCoModel, seed=0)):
            with memory_for(2000 * 2**20):
                refusal(partial(call, str(folder)), folder)
