"""A small table of a paper, and the command that runs it."""

from training.commands.tables.plan import Plan, parse_table

KNN = "weighted kNN, k 200, T 0.07"  # the monitor of the quickstart
DIGITS = {
    "dataset": "digits",
    "train_split": "train",
    "train_images": 1437,
    "split": "test",
    "split_images": 360,
    "label_column": "label",
    "classes": 10,
    "view": "short side 32 px, centre 32 px",
}
ABOUT = {
    "title": "Temperatures",
    "paper": "arXiv:0000.00000",
    "conditions": "ImageNet, 200 epochs",
    "source": "invented",
}
ROWS = [
    {"label": 0.1, "set": {"temperature": 0.1}, "paper": 60.5},
    {"label": 0.2, "set": {"temperature": 0.2}, "paper": "fails"},
    {"label": 0.5, "set": {"temperature": 0.5}, "source": "another paper"},
]
NO_NUMBERS = [row | {"paper": None} for row in ROWS[:2]]  # so that nothing is drawn


def plan_of(name, tmp_path, *words) -> Plan:
    return parse_table([name, "--output_dir", str(tmp_path / "out"), *words])
