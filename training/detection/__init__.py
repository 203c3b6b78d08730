"""Detection: datasets with boxes and masks, their views, and average precision by the metrics of VOC and COCO."""
