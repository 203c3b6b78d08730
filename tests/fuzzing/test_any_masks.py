"""Any mask and any list of a dataset for segmentation is read, or refused in one line."""

from functools import partial

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from masked_images import as_png, draw_splits, write_folder, write_voc
from mutations import PICTURES, few, mutated_bytes, refusal

from training.segmentation.dataset.opening import SegmentationDataArguments, load_segmentation

MASKS = [
    as_png(mask, palette) for mask in (pair[1] for pair in draw_splits()["train"][:2]) for palette in (False, True)
]


@few
@given(mutated_bytes(MASKS) | st.sampled_from(PICTURES))
def test_any_mask_is_read_or_refused(place, content):
    with place() as folder:
        write_folder(folder / "data")
        (folder / "data" / "train" / "masks" / "00.png").write_bytes(content)
        args = SegmentationDataArguments(dataset_name=str(folder / "data"))
        line = refusal(partial(load_segmentation, args))
        assert line is None or "train" in line


@few
@given(mutated_bytes([b"ground\nred\ngreen\n", b"\x1b[2J\nb\xc3\xa9\nc\n"]))
def test_any_names_of_classes_are_read_or_refused(place, content):
    with place() as folder:
        write_folder(folder / "data")
        (folder / "data" / "classes.txt").write_bytes(content)
        refusal(partial(load_segmentation, SegmentationDataArguments(dataset_name=str(folder / "data"))))


@few
@given(mutated_bytes([b"2012_train00\n2012_train01\n", b"/JPEGImages/2012_train00.jpg /x/2012_train00.png\n../../a\n"]))
def test_any_list_of_a_voc_is_read_or_refused(place, content):
    with place() as folder:
        year = write_voc(folder / "data") / "VOC2012"
        (year / "ImageSets" / "Segmentation" / "train.txt").write_bytes(content)
        args = SegmentationDataArguments(dataset_name=str(folder / "data"), train_split="2012_train")
        refusal(partial(load_segmentation, args))


def test_the_unchanged_ones_are_read(tmp_path):
    splits = load_segmentation(SegmentationDataArguments(dataset_name=str(write_folder(tmp_path))))
    assert np.array_equal(splits.train.mask(0), draw_splits()["train"][0][1])
