"""Any change of a dataset's boxes and masks is read, or refused in one line that names what is wrong."""

import json
from functools import partial

import numpy as np
from boxed_images import CLASSES, objects_of, rectangle, write_coco, write_voc
from hypothesis import given
from hypothesis import strategies as st
from mutations import few, refusal

from training.detection.dataset.annotations import check_objects
from training.detection.dataset.columns import read_objects
from training.detection.dataset.masks import check_segmentation, rasterize
from training.detection.dataset.opening import DetectionDataArguments, load_detection

SIZE = (40, 30)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["size", "counts", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.text(alphabet=st.characters(max_codepoint=130), max_size=30) | st.lists(st.integers(-3, 10**12), max_size=9))
def test_any_run_lengths_fill_the_image_or_are_refused(counts):
    mask = {"size": [30, 40], "counts": counts}
    if refusal(partial(check_segmentation, mask, *SIZE), "a mask") is None:
        assert rasterize(check_segmentation(mask, *SIZE), *SIZE).shape == (30, 40)


@given(ANYTHING)
def test_anything_is_a_mask_or_refused(mask):
    if refusal(partial(check_segmentation, mask, *SIZE), "a mask" if not isinstance(mask, list) else "a ") is None:
        assert rasterize(check_segmentation(mask, *SIZE), *SIZE).shape == (30, 40)


def checked(objects):
    image = read_objects(objects, "a.png", None, masks=True)
    return check_objects(image, SIZE, CLASSES, "xyxy")


IMAGE = (SIZE, [[2, 3, 20, 25], [10, 5, 40, 30]], [0, 2], [0, 0], [0, 1])
COLUMNS = ("bbox", "category", "iscrowd", "difficult", "segmentation", "area")


@given(st.sampled_from(COLUMNS), st.integers(0, 1), ANYTHING, st.booleans())
def test_anything_in_a_column_of_objects_is_objects_or_refused(column, place, value, whole):
    objects = objects_of(IMAGE, "xyxy", masks=True) | {"area": [1.0, 2.0]}
    objects[column] = value if whole else [value if i == place else one for i, one in enumerate(objects[column])]
    if refusal(partial(checked, objects), "a.png") is None:
        found = checked(objects)
        assert np.isfinite(found.boxes).all()
        assert set(found.labels.tolist()) <= {0, 1, 2}
        assert len(found.segmentations) == len(found) == len(found.area)


@few
@given(st.data())
def test_any_change_of_a_coco_file_is_read_or_refused(place, data):
    with place() as folder:
        path = write_coco(folder / "data") / "annotations" / "instances_train.json"
        content = json.loads(path.read_text())
        part, key = content, data.draw(st.sampled_from(list(content)))
        while isinstance(part[key], dict | list) and part[key] and data.draw(st.integers(0, 3)):
            part = part[key]
            key = data.draw(st.sampled_from(list(part) if isinstance(part, dict) else range(len(part))))
        part[key] = data.draw(ANYTHING)
        path.write_text(json.dumps(content))
        args = DetectionDataArguments(dataset_name=str(folder / "data"), masks=True)
        refusal(partial(load_detection, args))


@few
@given(st.data())
def test_any_change_of_a_voc_file_is_read_or_refused(place, data):
    with place() as folder:
        path = write_voc(folder / "data") / "VOC2007" / "Annotations" / "000000.xml"
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        args = DetectionDataArguments(dataset_name=str(folder / "data"), train_split="2007_train")
        refusal(partial(load_detection, args))


def test_the_unchanged_ones_are_read():
    assert len(checked(objects_of(IMAGE, "xyxy", masks=True))) == 2
    assert rasterize(check_segmentation(rectangle([2, 3, 20, 25], SIZE), *SIZE), *SIZE).sum() == 18 * 22
