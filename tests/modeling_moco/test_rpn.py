"""Anchors, proposals and their losses against plain loops in float64."""

import math

import pytest
import torch
from tiny_detectors import absolute, deltas, iou, rcnn_config
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from modeling_moco.rpn_moco import (
    Objects,
    RegionProposals,
    decode_boxes,
    encode_boxes,
    make_anchors,
    match_anchors,
    sample,
)

SIZES = [(64, 96), (80, 64)]
ONES = (1.0, 1.0, 1.0, 1.0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_boxes(n, width=96, height=80):
    start = torch.rand(n, 2) * torch.tensor([width * 0.6, height * 0.6])
    return torch.cat([start, start + 4 + torch.rand(n, 2) * torch.tensor([width * 0.35, height * 0.35])], dim=1)


def test_anchors_equal_a_loop_over_places_sizes_and_ratios():
    config = rcnn_config(anchor_sizes=(24, 50.5), anchor_ratios=(0.5, 1.0, 3.0))
    expected = []
    for y in range(3):
        for x in range(5):
            for size in (24, 50.5):
                for ratio in (0.5, 1.0, 3.0):
                    w, h = size / math.sqrt(ratio), size * math.sqrt(ratio)  # h / w is the ratio, w h the area
                    expected.append([16 * x - w / 2, 16 * y - h / 2, 16 * x + w / 2, 16 * y + h / 2])
    anchors = make_anchors(config, 3, 5, 16, torch.device("cpu"))
    torch.testing.assert_close(anchors.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)


def test_anchors_are_torchvisions_before_it_rounds_them():
    config = rcnn_config(anchor_sizes=(32, 64, 128, 256, 512))
    ours = make_anchors(config, 1, 1, 16, torch.device("cpu"))
    theirs = AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)).cell_anchors[0]  # by ratio, then by size
    theirs = theirs.view(3, 5, 4).transpose(0, 1).reshape(-1, 4)
    torch.testing.assert_close(ours, theirs, atol=0.5, rtol=0)
    assert not torch.equal(ours.round(), ours)
    assert torch.equal(ours.round(), theirs)


@pytest.mark.parametrize("weights", [ONES, (10.0, 10.0, 5.0, 5.0)])
def test_deltas_equal_a_plain_formula_and_lead_back(weights):
    boxes, origins = random_boxes(20), random_boxes(20)
    moves = encode_boxes(boxes, origins, weights)
    expected = [deltas(*pair, weights) for pair in zip(boxes.tolist(), origins.tolist(), strict=True)]
    torch.testing.assert_close(moves, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decode_boxes(moves, origins, weights), boxes, atol=1e-4, rtol=1e-5)
    of_classes = decode_boxes(moves[:, None].repeat(1, 3, 1), origins, weights)
    torch.testing.assert_close(of_classes, boxes[:, None].repeat(1, 3, 1), atol=1e-4, rtol=1e-5)


def test_no_box_grows_by_more_than_a_factor():
    grown = decode_boxes(torch.tensor([[0.0, 0.0, 1e4, 1e4]]), torch.tensor([[0.0, 0.0, 16.0, 32.0]]), ONES)
    torch.testing.assert_close(grown[:, 2:] - grown[:, :2], torch.tensor([[1000.0, 2000.0]]), atol=0.01, rtol=0)


def test_matches_equal_a_loop_also_for_an_object_that_no_anchor_fits():
    anchors = torch.cat([random_boxes(60), torch.tensor([[0.0, 0.0, 40.0, 40.0], [1.0, 1.0, 41.0, 41.0]])])
    boxes = torch.tensor([[2.0, 2.0, 40.0, 40.0], [70.0, 60.0, 74.0, 63.0], [30.0, 20.0, 60.0, 50.0]])
    overlap = [[iou(anchor, box) for box in boxes.tolist()] for anchor in anchors.tolist()]
    best_of = [max(row[i] for row in overlap) for i in range(3)]
    assert best_of[1] < 0.3  # positive although it fits badly
    object_of, positive, negative = match_anchors(anchors, boxes)
    for i, row in enumerate(overlap):
        chosen = any(math.isclose(value, best, rel_tol=1e-6) for value, best in zip(row, best_of, strict=True))
        assert object_of[i] == row.index(max(row))
        assert positive[i] == (max(row) >= 0.7 or chosen)
        assert negative[i] == (max(row) < 0.3 and not chosen)
    assert 2 < positive.sum() < 20
    assert negative.sum() > 5


def test_without_objects_every_anchor_is_negative():
    _, positive, negative = match_anchors(random_boxes(7), torch.zeros(0, 4))
    assert not positive.any()
    assert negative.all()


def test_samples_are_random_limited_and_filled_with_negative_ones():
    positive = torch.arange(100) < 10
    first, second = sample(positive, ~positive, 32, 0.25), sample(positive, ~positive, 32, 0.25)
    for chosen, others in (first, second):
        assert len(chosen.unique()) == len(chosen) == 8
        assert len(others.unique()) == len(others) == 24
        assert positive[chosen].all()
        assert not positive[others].any()
    assert not torch.equal(first[0], second[0])
    chosen, others = sample(positive, ~positive, 32, 0.5)
    assert (len(chosen), len(others)) == (10, 22)
    chosen, others = sample(positive, ~positive & (torch.arange(100) < 15), 32, 0.5)
    assert (len(chosen), len(others)) == (10, 5)


def region_proposals(**kwargs):
    module = RegionProposals(rcnn_config(**kwargs), 8, 16)
    for layer in (module.conv, module.objectness, module.deltas):
        torch.nn.init.normal_(layer.weight, std=0.1)
        torch.nn.init.normal_(layer.bias, std=0.3)
    return module


def test_both_losses_equal_loops_over_all_anchors():
    module = region_proposals(rpn_samples=2000)  # more than there are: the sample has all of them
    features = torch.randn(2, 8, 5, 6)
    objects = [Objects(random_boxes(2), torch.tensor([0, 1])), Objects(torch.zeros(0, 4), torch.zeros(0).long())]
    _, losses = module(features, SIZES, objects)
    hidden = module.conv(features).relu()
    scores, moves = module.objectness(hidden).double(), module.deltas(hidden).double()
    anchors = make_anchors(module.config, 5, 6, 16, features.device).tolist()
    entropy = distance = 0.0
    for i, target in enumerate(objects):
        boxes, place = target.boxes.tolist(), 0
        overlap = [[iou(anchor, box) for box in boxes] for anchor in anchors]
        best_of = [max(column) for column in zip(*overlap, strict=True)]
        for y in range(5):
            for x in range(6):
                for a in range(9):
                    row, anchor = overlap[place], anchors[place]
                    place += 1
                    best = max(row, default=0.0)
                    positive = best >= 0.7 or any(
                        math.isclose(value, of, rel_tol=1e-6) for value, of in zip(row, best_of, strict=True)
                    )
                    if best >= 0.3 and not positive:
                        continue
                    logit = scores[i, a, y, x].item()
                    entropy += math.log1p(math.exp(-logit if positive else logit))
                    if positive:
                        wanted = deltas(boxes[row.index(best)], anchor, ONES)
                        distance += absolute(moves[i, 4 * a : 4 * a + 4, y, x].tolist(), wanted)
    assert distance > 0
    assert losses["loss_rpn_cls"].item() == pytest.approx(entropy / (2000 * 2), rel=1e-5)
    assert losses["loss_rpn_loc"].item() == pytest.approx(distance / (2000 * 2), rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_proposals_are_the_best_apart_from_each_other_and_inside_the_image(training):
    limits = {"rpn_pre_nms_train": 100, "rpn_post_nms_train": 12, "rpn_pre_nms_test": 40, "rpn_post_nms_test": 7}
    module = region_proposals(**limits).train(training)
    features = torch.randn(2, 8, 5, 6)
    proposals, losses = module(features, SIZES)
    assert not losses
    hidden = module.conv(features).relu()
    anchors = make_anchors(module.config, 5, 6, 16, features.device)
    before, after = (100, 12) if training else (40, 7)
    for i, (height, width) in enumerate(SIZES):
        scores = module.objectness(hidden)[i].permute(1, 2, 0).flatten()
        moves = module.deltas(hidden)[i].permute(1, 2, 0).reshape(-1, 4)
        kept = []
        for place in scores.argsort(descending=True)[:before].tolist():
            box = decode_boxes(moves[place, None], anchors[place, None], ONES)[0]
            box = box.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
            empty = box[2] <= box[0] or box[3] <= box[1]
            if not empty and all(iou(box.tolist(), other.tolist()) <= 0.7 for other in kept):
                kept.append(box)
        assert len(kept) > after  # or the limit would not show
        torch.testing.assert_close(proposals[i], torch.stack(kept[:after]), atol=1e-4, rtol=1e-5)
        assert box_iou(proposals[i], proposals[i]).fill_diagonal_(0).max() <= 0.7
        assert not proposals[i].requires_grad
