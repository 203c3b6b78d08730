"""Every command that the pages show is one that its parser takes."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from training.commands import COMMANDS
from training.commands.embed import parse_embed
from training.commands.evaluations.knn import parse_knn
from training.commands.prepare import parse_prepare
from training.commands.tables.plan import parse_table
from training.evaluation.finetune import parse_finetune
from training.evaluation.linear_probe import parse_linear_probe
from training.recipe import parse_pretrain

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {name: module.rpartition(".")[2] for name, (module, _) in COMMANDS.items()}
MODULES = {module.rpartition(".")[2]: module for module, _ in COMMANDS.values()}
# By python, by a launcher or by SLURM. One without flags is the name of a script in a sentence.
STARTED = re.compile(r"(?:python |accelerate launch .*|sbatch )(?:scripts|configs/slurm)/(\w+)\.(?:py|sbatch)\b(.*)")
PARSERS = {
    "pretrain": parse_pretrain,
    "knn": parse_knn,
    "embed": parse_embed,
    "prepare": parse_prepare,
    "linear_probe": parse_linear_probe,
    "finetune": parse_finetune,
    "table": parse_table,
}


def shown(page: Path) -> list[tuple[str, str]]:
    """The script and the words of every command on a page, in blocks and within sentences."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [
        re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    ]
    commands = []
    for line in lines:
        line = line.split(" #")[0].strip()
        if (found := STARTED.match(line)) and found[1] in SCRIPTS.values() and found[2].strip():
            commands.append((found[1], found[2].strip()))
        elif (found := re.match(r"moco (\w+) (.+)", line)) and found[1] in SCRIPTS:
            commands.append((SCRIPTS[found[1]], found[2].strip()))
    return commands


SHOWN = [(page.relative_to(ROOT).as_posix(), *command) for page in PAGES for command in shown(page)]


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder in which the names of the pages exist: a run, and data."""
    for name in ("runs/mine", "runs/quickstart", "MODEL", "moco-v2-r50"):
        (tmp_path / name).mkdir(parents=True)
        recipe = {"data": {"dataset_name": "digits"}, "model": {}, "training": {}}
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)


def test_the_pages_show_commands_of_every_script():
    assert {script for _, script, _ in SHOWN} == set(SCRIPTS.values())


@pytest.mark.parametrize(("page", "script", "words"), SHOWN, ids=[" ".join(shown) for shown in SHOWN])
def test_a_shown_command_is_taken(page, script, words, user, capsys):
    argv = [word for word in shlex.split(words) if word not in ("...", "--help")]
    if script in PARSERS and argv != ["--tables"]:
        PARSERS[script](argv)
        return
    module = import_module(f"training.commands.{MODULES[script]}")
    with pytest.raises(SystemExit):
        module.main([*argv[:1], "--help"] if script == "benchmark" else ["--help"])
    known = capsys.readouterr().out
    for flag in (word.split("=")[0] for word in argv if word.startswith("--")):
        assert re.search(rf"{flag}\b", known), f"{page}: {script} has no {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_shown_make_target_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M)) <= targets
