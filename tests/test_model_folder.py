"""Models and checkpoints that a stranger made: a line says what is wrong, and nothing is run, asked for or filled."""

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from bombs import memory_for
from numbered_images import table
from safetensors.torch import load_file, save_file
from tiny_models import moco_config
from tiny_trainer import build

from modeling_moco import MoCoForImageClassification, MoCoImageProcessor, MoCoModel
from training.convert.files import read
from training.errors import TrainingError
from training.evaluation.encoder import Encoder
from training.hub.publish import load_published
from training.model_folder import load_model, read_config

MEGABYTES = 2**20
COMMANDS = {
    "convert": read,
    "kNN": lambda source: Encoder(source).load(MoCoModel, seed=0, head=True),
    "random": lambda source: Encoder(source, random=True).load(MoCoModel, seed=0),
    "probe": lambda source: Encoder(source).load(MoCoForImageClassification, seed=0),
    "publish": lambda source: load_published(source, training_state=True),
}
HOSTILE = {
    "queue_size": [10**13, 10**19, -5, 0, "64", 1.5, [64], None],
    "projection_dim": [10**13, 10**30],
    "num_labels": [10**12],
    "architecture": ["hf-hub:evil/x", "local-dir:/private", "../../x", ["resnet18"], None],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "evil"}, 7],
    "_attn_implementation": ["kernels-community/flash-attn", "flash_attention_2", "evil/x:y"],
    "attn_implementation": ["kernels-community/flash-attn", {"": "evil/x"}],
    "transformers_weights": ["../private.safetensors", "/etc/hostname", "evil/x", 7, 0, "", "pytorch_model.bin"],
    "dtype": ["load", "evil", 0],
    "model_args": [
        *({"checkpoint_path": "PRIVATE"}, {"pretrained": True}, {"pretrained_cfg": {"url": "http://127.0.0.1:9/x"}}),
        *({"pretrained_cfg_overlay": {"file": "PRIVATE"}}, {"cache_dir": "PRIVATE"}),
        *({"layers": [10**4] * 4}, {"in_chans": 10**9}, {"stem_width": [float("nan"), 10**9]}, {"block": "x"}, [1]),
        *({"features_only": True}, {"num_classes": 5}, {"global_pool": {"a": []}}),
    ],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    MoCoModel(moco_config()).save_pretrained(folder)
    MoCoImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asked():
    """Names and addresses that this process has asked the network for since the list was emptied."""
    found = []

    def watch(event, args):
        if event in ("socket.connect", "socket.getaddrinfo"):
            found.append(args)

    sys.addaudithook(watch)
    return found


@pytest.fixture
def model(saved, tmp_path):
    """A copy of a model with another setting, beside a private file."""
    (tmp_path / "private.safetensors").write_bytes((saved / "model.safetensors").read_bytes())

    def change(**settings) -> str:
        folder = tmp_path / "model"
        folder.mkdir()
        for path in saved.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(
            json.dumps(config).replace("PRIVATE", str(tmp_path / "private.safetensors"))
        )
        return str(folder)

    return change


@pytest.mark.filterwarnings("ignore")  # transformers and timm may say something too
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_setting_is_one_line_of_every_command(name, model, tmp_path, asked, capfd):
    for value in HOSTILE[name]:
        source = model(**{name: value})
        for command, run in COMMANDS.items():
            del asked[:]
            with memory_for(2000 * MEGABYTES), pytest.raises(ValueError, match=r".") as error:
                run(source)
            assert type(error.value) is ValueError, (command, value)
            assert str(error.value).isprintable()
            assert source in str(error.value), (command, value)
            assert not asked
        capfd.readouterr()
        for path in Path(source).iterdir():
            path.unlink()
        Path(source).rmdir()
    assert os.listdir(tmp_path) == ["private.safetensors"]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "probe"])  # which builds the encoder alone
@pytest.mark.parametrize("name", ["queue_size", "projection_dim"])
def test_a_model_is_not_far_larger_than_its_weights(command, name, model):
    source = model(**{name: 10**10})
    with memory_for(2000 * MEGABYTES), pytest.raises(ValueError, match=rf"{name} 10,000,000,000.*of another model"):
        COMMANDS[command](source)


@pytest.mark.parametrize(
    ("name", "value"), [("auto_map", {"AutoModel": "evil/x--m.M"}), ("_name_or_path", "evil/x"), ("tp_plan", "auto")]
)
def test_a_setting_of_other_code_does_nothing(name, value, model, saved, asked):
    source = model(**{name: value})
    del asked[:]
    for run in COMMANDS.values():
        run(source)
    assert not asked
    tensors = Encoder(source).load(MoCoModel, seed=0, head=True).state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_file(saved / "model.safetensors").items())


def test_weights_come_from_no_other_folder(model, tmp_path):
    source = Path(model())
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(tmp_path / "private.safetensors")
    for run in COMMANDS.values():
        with pytest.raises(ValueError, match=r"model.safetensors leads out of .*/model: put the file itself there"):
            run(str(source))
    (source / "model.safetensors").unlink()
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(MoCoModel(moco_config()).state_dict(), "../private.safetensors"),
    }
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    for run in COMMANDS.values():
        with pytest.raises(ValueError, match=r"private.safetensors leads out of .*/model"):
            run(str(source))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("header", ["claims", "long", "cut"])
def test_a_header_that_claims_more_than_the_file_has_is_one_line(command, header, model):
    source = model()
    path = Path(source) / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + length])
    tensors["dictionary.queue"] |= {"shape": [16, 10**12], "data_offsets": [0, 64 * 10**12]}
    claims = json.dumps(tensors).encode()
    path.write_bytes(
        {
            "claims": len(claims).to_bytes(8, "little") + claims + content[8 + length :],
            "long": (2**40).to_bytes(8, "little") + content[8:],
            "cut": content[: len(content) // 2],
        }[header]
    )
    if command == "random":  # it reads no weights
        return
    with memory_for(2000 * MEGABYTES), pytest.raises(ValueError, match="MoCo model"):
        COMMANDS[command](source)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "random"])
@pytest.mark.parametrize("name", ["encoder_q.conv1.0.weight", "encoder_q.conv1.1.running_var"])
def test_weights_that_are_not_finite_are_measured_and_published_by_no_command(command, name, model):
    source = model()
    weights = Path(source) / "model.safetensors"
    state = load_file(weights)
    state[name].view(-1)[0] = float("nan")
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} that are not finite"):
        COMMANDS[command](source)


def test_weights_of_pickle_are_not_read(model, tmp_path):
    source = Path(model())
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(state | {"x": RunsCode(tmp_path / "canary")}, source / "pytorch_model.bin")
    for run in COMMANDS.values():
        with pytest.raises(ValueError, match="MoCo model") as error:
            run(str(source))
        assert "weights_only" not in str(error.value)
    assert not (tmp_path / "canary").exists()


class RunsCode:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


# Checkpoints of a run


def packed(path: Path, content) -> None:
    """The archive of torch with every member packed."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    build(table(range(16)), folder, num_train_epochs=1, save_strategy="epoch").train()
    (checkpoint,) = folder.glob("checkpoint-*")
    return checkpoint


@pytest.mark.parametrize("kind", ["code", "bomb", "text"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_resumed_run_loads_no_code_and_unpacks_no_bomb(name, kind, run, tmp_path):
    whole = (run / name).read_bytes()
    trainer = build(table(range(16)), run.parent, num_train_epochs=2)
    if kind == "code":
        torch.save({"state": RunsCode(tmp_path / "canary")}, run / name)
    elif kind == "bomb":
        packed(run / name, {"state": torch.zeros(4 * 10**7)})
    else:
        (run / name).write_bytes(pickle.dumps("text", protocol=2))
    try:
        with memory_for(300 * MEGABYTES), pytest.raises(TrainingError, match=r"delete .*checkpoint-") as error:
            trainer.train(resume_from_checkpoint=str(run))
    finally:
        (run / name).write_bytes(whole)
    assert str(run) in str(error.value)
    assert str(error.value).isprintable()
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "canary").exists()


def test_a_file_of_other_code_that_unpacks_to_gigabytes_is_not_read(tmp_path):
    packed(
        path := tmp_path / "there.pth.tar", {"state_dict": {"module.encoder_q.conv1.weight": torch.zeros(4 * 10**7)}}
    )
    assert path.stat().st_size < MEGABYTES
    with memory_for(100 * MEGABYTES), pytest.raises(ValueError, match="is damaged: it unpacks to 160,000,"):
        read(str(path))


def test_one_member_that_is_listed_many_times_is_not_read(tmp_path):
    torch.save({"state_dict": {"module.queue": torch.zeros(2 * 10**6)}}, path := tmp_path / "there.pth.tar")
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        archive.filelist += [largest] * 20
        archive._didModify = True
    with memory_for(50 * MEGABYTES), pytest.raises(ValueError, match="is damaged: it unpacks to 168,000,"):
        read(str(path))


def test_a_queue_that_shows_one_number_a_trillion_times_is_not_copied(tmp_path):
    wide = torch.zeros(()).expand(128, 10**11)
    state = {"module.queue": wide, "module.encoder_q.conv1.weight": torch.zeros(64, 3, 7, 7)}
    torch.save({"state_dict": state}, path := tmp_path / "there.pth.tar")
    with memory_for(100 * MEGABYTES), pytest.raises(ValueError, match="queue, which are not dense tensors with data"):
        read(str(path))


def test_a_model_with_the_queue_and_the_second_encoder_left_out_still_loads(model):
    source = Path(model(queue_size=65536))
    state = load_file(source / "model.safetensors")
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("encoder_q.")}
    save_file(encoder, source / "model.safetensors", metadata={"format": "pt"})
    loaded, _ = load_model(str(source), read_config(str(source)), MoCoModel, {})
    assert loaded.dictionary.queue.shape == (16, 65536)
    assert Encoder(str(source)).load(MoCoModel, seed=0).encoder_q
