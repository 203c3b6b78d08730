"""Images of coloured rectangles on noise, with their boxes, as a folder with metadata.jsonl in each split."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["red", "green"]
COLOURS = [(220, 40, 40), (40, 200, 60)]


def draw_boxes(folder: Path, train: int = 12, test: int = 6, side: int = 96) -> Path:
    """Write `train` and `test` images, wide and tall in turn, of one to three rectangles each."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        (folder / split).mkdir(parents=True)
        rows = []
        for number in range(count):
            width, height = (side, side * 2 // 3)[:: 1 if number % 2 else -1]
            pixels = random.integers(90, 160, (height, width, 3), dtype=np.uint8)
            boxes, names = [], []
            for _ in range(random.integers(1, 4)):
                w, h = random.integers(16, 32, 2).tolist()
                x, y = int(random.integers(0, width - w)), int(random.integers(0, height - h))
                kind = int(random.integers(len(CLASSES)))
                pixels[y : y + h, x : x + w] = COLOURS[kind]
                boxes.append([x, y, w, h])
                names.append(CLASSES[kind])
            name = f"{number:03}.png"
            Image.fromarray(pixels).save(folder / split / name)
            rows.append({"file_name": name, "objects": {"bbox": boxes, "category": names}})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / split / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return folder
