"""`--preview_views` shows the views that training will make."""

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import TINY

from training.data.decode import decode_image
from training.data.images import collate
from training.data.pipeline import build_render, training_images
from training.data.sources import load_images
from training.pretrain import build_trainer, drawn_images
from training.recipe import parse_pretrain
from training.views.device import sample_operations, unpack_params
from training.views.opencv import crop_and_resize
from training.views.policy import VIEWS, build_policies


@pytest.mark.parametrize("policy", ["v1", "v2"])
def test_the_preview_shows_the_views_of_epoch_0(policy, tmp_path):
    args = parse_pretrain([*TINY, "--augmentation", policy, "--seed", "7", "--output_dir", str(tmp_path / "run")])
    splits = load_images(args.data)
    drawn = list(drawn_images(args, splits))
    assert len(drawn) == 8
    images = build_trainer(args, splits).train_dataset
    for i, (image, _, views) in enumerate(drawn):
        trained = images[8 * i]
        assert torch.equal(views[0], trained["pixel_values"])
        assert torch.equal(views[1], trained["key_pixel_values"])
        assert np.array_equal(np.array(image), np.array(decode_image(splits.train[8 * i]["image"])))
    images.set_epoch(1)
    assert not torch.equal(drawn[0].views[0], images[0]["pixel_values"])


def test_the_preview_of_a_stream_shows_the_views_of_its_images(tmp_path):
    args = parse_pretrain([*TINY, "--streaming", "--output_dir", str(tmp_path / "run")])
    splits = load_images(args.data)
    trained = {sample["pixel_values"].numpy().tobytes() for sample in build_trainer(args, splits).train_dataset}
    drawn = list(islice(drawn_images(args, splits), 8))
    assert len({example.views[0].numpy().tobytes() for example in drawn} & trained) == 8


def test_the_preview_of_device_views_shows_the_draws_of_their_crops(tmp_path):
    # A stream, for it is not kept in memory however small its images are.
    args = parse_pretrain([*TINY, "--streaming", "--view_backend", "device", "--output_dir", str(tmp_path / "run")])
    splits = load_images(args.data)
    samples, data = build_trainer(args, splits).train_dataset, args.data
    policy, _ = build_policies(data.augmentation, data.horizontal_flip, data.crop_min_scale)
    trained = {sample["pixel_values"].numpy().tobytes(): sample["numbers"] for sample in samples}
    for example in islice(drawn_images(args, splits), 8):
        query, key = example.params
        image = torch.from_numpy(np.array(example.image)).permute(2, 0, 1)
        crop = crop_and_resize(image, query.box, data.image_size).permute(1, 2, 0)
        rows = sample_operations(trained[crop.numpy().tobytes()], policy)
        for params, row in zip((query, key), rows, strict=True):
            assert unpack_params(torch.tensor(params.box), row) == params


@pytest.mark.parametrize("backend", ["cv2", "device"])
@pytest.mark.parametrize("dictionary", ["queue", "bank"])
def test_the_preview_shows_unequal_views_and_the_one_view_of_a_bank(dictionary, backend, tmp_path):
    args = parse_pretrain(
        [*TINY, "--augmentation", "v3", "--view_backend", backend, "--output_dir", str(tmp_path / "run")]
    )
    args.config.dictionary, data = dictionary, args.data
    splits, bank = load_images(data), dictionary == "bank"
    images = training_images(data, splits, args.training, bank)
    in_memory = backend == "device"
    rows = images.with_pixels(images.batch([0, 8], 0)) if in_memory else collate([images[0], images[8]])
    render = build_render(data, compiled=False, bank=bank) or dict
    trained = render(rows)
    drawn = list(islice(drawn_images(args, splits), 2))
    for i, example in enumerate(drawn):
        assert len(example.views) == len(example.params) == (1 if bank else 2)
        assert example.params[0].blur > 0
        for name, view in zip(VIEWS, example.views, strict=False):
            assert (view.float() - trained[name][i].float()).abs().mean() < 3
    assert ("index" in trained) == bank


def test_a_preview_writes_two_figures_and_nothing_else(tmp_path, script, capsys):
    path = tmp_path / "views.png"
    path.write_text("an older figure")
    script("pretrain").main([*TINY, "--output_dir", str(tmp_path / "run"), "--preview_views", str(path)])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["views.png", "views.svg"]
    with Image.open(path) as image:
        assert image.width == 1600
    assert "epoch 0" in capsys.readouterr().out


def test_broken_images_are_left_out_of_the_preview(tmp_path):
    folder = tmp_path / "images" / "train" / "a"
    folder.mkdir(parents=True)
    for i in range(16):
        image = Image.new("RGB", (40, 40), (i, i, i))
        image.paste("white", (20, 20, 40, 40))
        image.save(folder / f"{i:02}.png")
    (folder / "02.png").write_bytes(b"not a picture")
    flags = ["--dataset_name", str(tmp_path / "images"), "--output_dir", str(tmp_path / "run")]
    args = parse_pretrain([*TINY, *flags])
    drawn = list(drawn_images(args, load_images(args.data)))
    assert [example.image.getpixel((0, 0))[0] for example in drawn] == [0, 4, 6, 8, 10, 12, 14]
