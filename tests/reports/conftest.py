"""What tests of tables and comparisons share: a table, and runs as they are left."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from paper_tables import ABOUT, DIGITS, KNN, ROWS
from tiny_models import save_encoder

from modeling_moco import MoCoModel
from training.engine.results import Result, append_results, encoder_digest
from training.engine.run_folder import write_recipe
from training.recipe import parse_pretrain


@pytest.fixture
def definition(tmp_path):
    """Writes a table: `definition(rows=...)`, and gives its path."""

    def make(about=ABOUT, **changed) -> str:
        content = {"base": "quickstart", "measure": "kNN", "x": "T", "rows": ROWS} | changed
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"about": about, "table": {k: v for k, v in content.items() if v is not None}}))
        return str(path)

    return make


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> tuple[Path, str]:
    """A model on disk, and the digest of its features."""
    folder = save_encoder(tmp_path_factory.mktemp("encoder"))
    return folder, encoder_digest(MoCoModel.from_pretrained(folder))


@pytest.fixture
def ran(encoder):
    """Leaves in a cell's folder what its run leaves: `ran(plan, 0, 91.5, protocol=...)`; without a value it has not ended."""

    def leave(
        plan, number, value=None, protocol=KNN, processes=1, n=360, model=None, bank=1437, commit=None, **data
    ) -> Path:
        cell = plan.cells[number]
        settings = parse_pretrain([*plan.rows[cell.row.folder].words, "--seed", str(cell.seed), "--use_cpu"]).settings
        shutil.copytree(encoder[0], cell.folder)
        write_recipe(cell.folder, {"about": {"title": "mine"}} | settings)
        history = [{"epoch": i, "loss": 6.0 - i, "contrast_top1": 10.0 * i} for i in range(3)]
        state = {"global_step": 8, "max_steps": 8, "epoch": 2, "num_train_epochs": 2, "log_history": history}
        if value is None:
            return cell.folder
        (cell.folder / "trainer_state.json").write_text(json.dumps(state))
        (cell.folder / "metrics.json").write_text(
            json.dumps({"ended": "2026-01-01", "processes": processes, "commit": commit, "data": DIGITS})
        )
        knn = {"bank": bank} if protocol.startswith("weighted kNN") else {}
        result = Result(protocol, "top1", value, n, settings=knn, seed=cell.seed)
        append_results(cell.folder, [result], model=model or encoder[1], data=DIGITS | data)
        return cell.folder

    return leave
