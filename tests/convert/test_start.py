"""A run that begins with weights: what is taken, what is new, and that it continues as any run."""

import pytest
import timm
import torch
from exported_models import published, saved
from foreign_checkpoints import lincls, official, official_v3, prefixed, resave
from ranks import join_trainers, run_ranks
from timm.models import save_for_hf
from tiny_models import assert_equal, key_parts, moco_config, query_parts
from tiny_trainer import StopAt, build, image_rows, tiny_model
from transformers import AutoModel, AutoModelForImageClassification, TrainerCallback

from modeling_moco import MoCoConfig, MoCoForImageClassification, MoCoImageProcessor, MoCoModel
from training.convert.files import read
from training.convert.start import begin_with, read_start
from training.data.sources import load_images
from training.pretrain import announce, build_trainer
from training.recipe import load_recipe, parse_pretrain

TINY = [
    *("--dataset_name", "digits", "--max_train_samples", "64", "--max_eval_samples", "16", "--image_size", "32"),
    *("--eval_resize", "32", "--queue_size", "64", "--projection_dim", "16", "--global_batch_size", "16", "--use_cpu"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False", "--disable_tqdm", "True"),
    *("--knn_k", "5", "--eval_every_n_epochs", "9", "--num_train_epochs", "2"),
]


@pytest.fixture
def source(trained, tmp_path):
    """A folder with a model whose tensors all differ from their initial values, as a run leaves it."""
    folder = tmp_path / "source"
    trained.save_pretrained(folder)
    MoCoImageProcessor().save_pretrained(folder)
    return folder


def start(model: MoCoModel, source) -> list[str]:
    begun = read_start(str(source), model.config)
    begin_with(model, begun)
    return begun.notes


def new_model(**kwargs) -> MoCoModel:
    torch.manual_seed(3)
    return MoCoModel(moco_config(**kwargs))


# What is taken


def test_all_of_a_run_is_taken(source, trained):
    model = new_model()
    assert start(model, source) == []
    assert_equal(model.state_dict(), trained.state_dict())
    assert not any(p.requires_grad for p in [*model.encoder_k.parameters(), *model.projector_k.parameters()])


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_a_published_model_that_transformers_has_saved_is_read_as_ours(kind, tmp_path):
    model = saved(tmp_path / "saved", "test_resnet", kind)
    folder = published(tmp_path / "saved", tmp_path / "published")
    auto = AutoModel if kind == "encoder" else AutoModelForImageClassification
    auto.from_pretrained(folder).save_pretrained(tmp_path / "wrapper")
    state = read(str(tmp_path / "wrapper"), timm_too=True).state
    assert_equal(state, {name: x for name, x in model.state_dict().items() if name in state})
    if kind == "encoder":
        begun = new_model()
        assert start(begun, tmp_path / "wrapper")
        assert_equal(begun.encoder_q.state_dict(), model.encoder_q.state_dict())
    else:
        with pytest.raises(ValueError, match="is a classifier"):
            start(new_model(), tmp_path / "wrapper")


def test_of_an_encoder_alone_the_key_encoder_is_a_copy(trained, tmp_path):
    encoder = MoCoModel(trained.config, momentum_encoder=False)
    encoder.encoder_q.load_state_dict(trained.encoder_q.state_dict())
    encoder.save_pretrained(tmp_path / "encoder")
    model = new_model()
    projector = [p.clone() for p in model.projector_q.parameters()]
    assert start(model, tmp_path / "encoder") == [
        "the projector is new",
        "the key encoder is a copy of the query encoder",
        "the queue is new",
    ]
    assert_equal(model.encoder_q.state_dict(), trained.encoder_q.state_dict())
    assert_equal(key_parts(model), query_parts(model, rename=True))
    assert all(torch.equal(a, b) for a, b in zip(projector, model.projector_q.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "notes", "kept"),
    [
        ({"queue_size": 32}, ["the queue is new: dictionary.queue (16, 32) is (16, 64) there"], True),
        (
            {"projection_dim": 8},
            [
                "the projector is new: projector_q.2.weight (8, 96) is (16, 96) there",
                "the key encoder is a copy of the query encoder: projector_k",
                "the queue is new: dictionary.queue (8, 64) is (16, 64) there",
            ],
            False,
        ),
        (
            {"stem": "small"},
            [
                "new in the encoder: conv1.weight (32, 3, 3, 3) is not there",
                "the key encoder is a copy of the query encoder",
                "the queue is new: it depends on the parts above",
                "left out:",
                "the stem is 'small' here and 'default' there",
            ],
            False,
        ),
    ],
    ids=["queue", "projector", "stem"],
)
def test_what_does_not_fit_is_new_and_said(source, trained, changes, notes, kept):
    model = new_model(**changes)
    said = start(model, source)
    for sentence, beginning in zip(said, notes, strict=True):
        assert beginning in sentence.replace("encoder_q.", "") or sentence.startswith(beginning.split(":")[0])
    assert torch.equal(model.encoder_q.layer4[0].conv1.weight, trained.encoder_q.layer4[0].conv1.weight)
    keys, own = key_parts(model), query_parts(model, rename=True)
    if kept:
        assert_equal(keys, key_parts(trained))
    else:
        assert_equal(keys, own)


def test_an_official_checkpoint_is_taken_as_it_is_converted(tmp_path):
    official(tmp_path / "moco.pth.tar")
    model = MoCoModel(MoCoConfig(architecture="resnet18", projection_dim=16, queue_size=48))
    assert start(model, tmp_path / "moco.pth.tar") == []
    assert_equal(dict(model.state_dict()), dict(read(str(tmp_path / "moco.pth.tar")).state))


def test_an_official_checkpoint_of_v3_gives_what_fits(tmp_path):
    official_v3(tmp_path / "moco.pth.tar")
    checkpoint = read(str(tmp_path / "moco.pth.tar"))
    model = MoCoModel(checkpoint.config)
    assert start(model, tmp_path / "moco.pth.tar") == []
    assert_equal(dict(model.state_dict()), dict(checkpoint.state))
    assert not any(p.requires_grad for p in [*model.encoder_k.parameters(), *model.projector_k.parameters()])

    checkpoint.config.prediction_head = "mlp_bn"
    model = MoCoModel(checkpoint.config)
    said = start(model, tmp_path / "moco.pth.tar")
    assert said == ["the predictor is new: predictor_q.4.running_mean (16,) is not there"]
    state = model.state_dict()
    taken = {name: x for name, x in state.items() if not name.startswith("predictor_q")}
    assert_equal(taken, {name: x for name, x in checkpoint.state.items() if name in taken})


@pytest.mark.parametrize(
    ("part", "there", "here", "norm"),
    [
        ("predictor_q", {"prediction_head": "mlp_bn"}, {"prediction_head": "mlp"}, "4.num_batches_tracked ()"),
        ("projector_q", {"projection_head": "simclr"}, {"projection_head": "mlp_bn"}, "4.weight (16,)"),
    ],
)
def test_a_head_with_one_more_layer_or_scale_is_not_taken_without_it(part, there, here, norm, tmp_path):
    heads = {"projection_head": "mlp_bn", "prediction_head": "mlp_bn", "dictionary": "batch", "symmetric_loss": True}
    MoCoModel(moco_config(**heads | there)).save_pretrained(tmp_path)
    model = new_model(**heads | here)
    before = {name: x.clone() for name, x in model.state_dict().items() if name.startswith(part)}
    words = {"projector_q": "the projector", "predictor_q": "the predictor"}[part]
    assert f"{words} is new: {part}.{norm} is not here" in start(model, tmp_path)
    assert_equal({name: x for name, x in model.state_dict().items() if name in before}, before)
    if part == "projector_q":
        assert_equal(key_parts(model), query_parts(model, rename=True))


def test_other_arguments_of_the_encoder_that_no_tensor_shows_are_said(tmp_path):
    MoCoModel(moco_config("test_vit", model_args={"img_size": 32, "act_layer": "relu"})).save_pretrained(tmp_path)
    said = start(MoCoModel(moco_config("test_vit")), tmp_path)
    assert said == ["model_args are {} here and {'act_layer': 'relu'} there"]


def test_other_heads_of_attention_are_refused(tmp_path):
    vit = moco_config("test_vit")
    MoCoModel(vit).save_pretrained(tmp_path / "vit")
    read_start(str(tmp_path / "vit"), vit)
    vit.model_args = {"img_size": 32, "num_heads": 4}
    with pytest.raises(ValueError, match=r"num_heads=None, but this run has num_heads=4: pass them to --model_args"):
        read_start(str(tmp_path / "vit"), vit)


@pytest.mark.parametrize("architecture", ["test_resnet", "test_convnext", "test_vit"])
def test_timms_weights_are_taken_with_their_mean_and_std(architecture, tmp_path):
    torch.manual_seed(5)
    pretrained = timm.create_model(architecture, num_classes=10)
    pretrained.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    save_for_hf(pretrained, tmp_path / "timm", safe_serialization=True)
    flags = [*TINY, "--architecture", architecture, "--output_dir", str(tmp_path / "run")]
    flags += ["--init_from", f"local-dir:{tmp_path / 'timm'}", "--image_size", "160", "--eval_resize", "160"]
    args = parse_pretrain(flags)
    begun = read_start(args.init_from, args.config)
    args.begin_with(begun)
    model = MoCoModel(args.config)
    begin_with(model, begun)
    mine, theirs = model.encoder_q.state_dict(), pretrained.state_dict()
    assert_equal(mine, {name: theirs[name] for name in mine})
    assert len(theirs) == len(mine) + 2  # without weight and bias of its classifier
    assert args.config.image_mean == [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"does not contain a MoCo model \(model_type timm_wrapper"):
        read(str(tmp_path / "timm"))  # a converted model is published as one that MoCo has trained
    args = parse_pretrain([*flags, "--image_mean", "0.4", "0.4", "0.4"])
    args.begin_with(begun)
    assert args.config.image_mean == [0.4, 0.4, 0.4]


def test_position_embeddings_are_resampled_as_timm_does(tmp_path):
    torch.manual_seed(5)
    save_for_hf(timm.create_model("test_vit", num_classes=10), tmp_path / "timm", safe_serialization=True)
    model = MoCoModel(moco_config("test_vit"))
    notes = start(model, tmp_path / "timm")
    assert notes[:2] == [
        "left out: encoder_q.head.bias, encoder_q.head.weight",
        "resampled: encoder_q.pos_embed (1, 101, 64) to (1, 5, 64)",
    ]
    overlay = {"file": str(tmp_path / "timm" / "model.safetensors"), "num_classes": 10}
    there = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay, img_size=32, num_classes=0)
    assert_equal(model.encoder_q.state_dict(), there.state_dict())


# Bad input


def test_what_cannot_be_begun_with_is_one_line_and_nothing_is_written(source, trained, script, tmp_path, capsys):
    MoCoForImageClassification(moco_config()).save_pretrained(tmp_path / "classifier")
    lincls(tmp_path / "lincls.pth.tar")
    torch.save({"student": {}, "teacher": {}}, tmp_path / "dino.pth")
    state = prefixed(official(tmp_path / "half.pth"), "module.")
    resave(tmp_path / "half.pth", state_dict={name: x for name, x in state.items() if "layer4" not in name})
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for name, reason in {
        "classifier": "is a classifier, whose encoder may have seen labels: pass the pretrained encoder",
        "lincls.pth.tar": "is a classifier, whose encoder may have seen labels",
        "dino.pth": "a DINO checkpoint (student and teacher)",
        "half.pth": "It is damaged or another model",
        "empty": "does not contain a MoCo model",
        "nowhere": "is not a file, a folder or a Hub repository that can be reached",
    }.items():
        flags = ["--init_from", str(tmp_path / name), "--output_dir", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as end:
            script("pretrain").main([*TINY, *flags])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert reason in error, name
        assert not (tmp_path / "run").exists()
    other = ["--init_from", str(source), "--architecture", "resnet18", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        script("pretrain").main([*TINY, *other])
    assert (
        "is a test_resnet, but this run trains a resnet18: pass --architecture test_resnet" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


# A run that begins with weights


def trainer_of(source, folder, *flags):
    args = parse_pretrain([*TINY, "--init_from", str(source), "--output_dir", str(folder), *flags])
    begun = read_start(args.init_from, args.config)
    args.begin_with(begun)
    return args, begun, build_trainer(args, load_images(args.data), begun)


def test_the_announcement_says_where_a_run_begins(source, tmp_path, capsys):
    args, begun, trainer = trainer_of(source, tmp_path / "run", "--queue_size", "32")
    announce(args, trainer, begun)
    said = capsys.readouterr().out
    assert f"start: from {source} (MoCo v2, test_resnet, K 64, dim 16)" in said
    assert "- the queue is new: dictionary.queue (16, 32) is (16, 64) there" in said
    assert "queue: begins with keys of training images" in said


@pytest.mark.slow
def test_a_run_that_was_begun_with_other_weights_is_not_continued(source, script, tmp_path, capsys):
    flags = [*TINY, "--init_from", str(source), "--output_dir", str(tmp_path / "run")]
    script("pretrain").main([*flags, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"])
    (tmp_path / "run" / "metrics.json").unlink()  # as if it were interrupted before its end
    recipe = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert recipe.values["init_from"] == str(source)
    torch.manual_seed(9)
    MoCoModel(moco_config()).save_pretrained(source)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        script("pretrain").main([*flags, "--max_steps", "2"])
    assert f"{source} is not the encoder that the run in {tmp_path / 'run'} was begun with" in capsys.readouterr().err


class StepZero(TrainerCallback):
    """The queue as the first step finds it."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.queue = model.dictionary.queue.clone()
            control.should_training_stop = True


@pytest.mark.parametrize("images", ["indexed", "memory", "stream"])
def test_an_encoded_queue_has_keys_of_images_which_the_encoder_confuses_more_than_noise(images, tmp_path):
    queues, first = {}, {}
    for queue_start in ("random", "encode", None):
        seen = StepZero()
        kind = {images: True} if images != "indexed" else {}
        trainer = build(image_rows(), tmp_path / str(queue_start), callback=seen, queue_start=queue_start, **kind)
        untouched = trainer.model.dictionary.queue.roll(1, dims=1)  # as of a run that went on
        trainer.model.dictionary.queue.copy_(untouched)
        trainer.train()
        queues[queue_start], first[queue_start] = seen.queue, trainer.state.log_history[0]
        if queue_start is None:
            assert torch.equal(seen.queue, untouched)
    for queue in queues.values():
        torch.testing.assert_close(queue.norm(dim=0), torch.ones(16))
    for noise in ("random", None):
        assert first[noise]["contrast_top1"] == 100
        assert first["encode"]["contrast_top1"] <= 50
        assert first["encode"]["hardest_negative_similarity"] > 2 * first[noise]["hardest_negative_similarity"]
    assert not torch.equal(queues["random"], queues[None])


def test_a_queue_larger_than_the_dataset_has_other_views_of_the_same_images(tmp_path):
    seen = StepZero()
    model = tiny_model(queue_size=61)  # of 26 images, in batches of four
    build(image_rows(), tmp_path, model, callback=seen, queue_start="encode").train()
    assert len(torch.unique(seen.queue.T, dim=0)) == 61


@pytest.mark.slow
def test_a_run_with_an_encoded_queue_continues_exactly(tmp_path):
    def run(folder, stop=None):
        settings = {"queue_start": "encode", "save_strategy": "steps", "save_steps": 2}
        trainer = build(image_rows(), folder, callback=StopAt(stop), **settings)
        trainer.train(resume_from_checkpoint=True if stop is None and (folder / "checkpoint-2").exists() else None)
        return trainer.model.state_dict()

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=2)
    assert_equal(run(tmp_path / "parts"), whole)


def test_an_encoded_queue_is_the_same_when_a_run_begins_again(tmp_path):
    found = []
    for name in ("first", "second"):
        seen = StepZero()
        build(image_rows(), tmp_path / name, callback=seen, queue_start="encode").train()
        found.append(seen.queue)
    assert torch.equal(*found)


def _rank(rank, folder):
    join_trainers(rank, folder, 2)
    seen = StepZero()
    build(image_rows(), f"{folder}/run", callback=seen, queue_start="encode", per_device_train_batch_size=2).train()
    torch.save(seen.queue, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_fill_one_queue_with_the_images_of_both(tmp_path):
    run_ranks(_rank, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert len(torch.unique(first.T, dim=0)) == 16  # of four batches of two from each process
