"""The rooms of the project: which may import which, what reaches the Hub, what is overridden of other libraries, every help."""

import ast
import inspect
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import modeling_moco
import training.commands
from training import process
from training.commands import COMMANDS

ROOT = Path(__file__).parents[1]
# A module imports from rooms with a smaller number, and from its own. docs/design.md has the same order in words.
FLOORS = {
    **{"errors": 0, "modeling_moco": 0},
    **{"cli": 1, "views": 1, "health": 1},
    **{"optimization": 2, "engine": 3},
    **{"data": 4, "plots": 4, "model_folder": 4},
    **{"evaluation": 5, "hub": 5, "convert": 5},
    **{"monitor": 6, "reports": 6, "process": 6, "embedding": 6, "transfer": 6},
    **{"detection": 7, "segmentation": 7, "preparation": 7},
    **{"trainer": 7, "recipe": 8, "pretrain": 9, "benchmarks": 10, "commands": 11},
}
# Calls of huggingface_hub and of transformers that send something to the Hub or make something there.
UPLOADS = {
    *("HfApi", "create_branch", "create_commit", "create_repo", "upload_file", "upload_folder", "upload_large_folder"),
    *("CommitScheduler", "HfFileSystem", "push_to_hub", "run_as_future", "preupload_lfs_files"),
}
# Private methods of other libraries that we override. Each has its reason beside it.
PRIVATE_OVERRIDES = {
    "training.cli._Help._format_action_invocation",
    # The hook that transformers documents for new models.
    "modeling_moco.modeling_moco.MoCoPreTrainedModel._init_weights",
    # The hook that transformers documents for image processors that take annotations too.
    "modeling_moco.image_processing_moco.MoCoDetectionImageProcessor._preprocess_image_like_inputs",
}


def modules(package: str) -> dict[str, Path]:
    paths = (ROOT / package).rglob("*.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(name: str, path: Path) -> set[str]:
    """Modules and names of ours that a module imports, as dotted names."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("training", "modeling_moco", "scripts", "tests")}


def room(name: str) -> str:
    first, *rest = name.split(".")
    return rest[0] if first == "training" and rest else first


def test_every_import_runs_down():
    for name, path in modules("training").items():
        if name == "training":
            continue
        for other in imported(name, path):
            here, there = room(name), room(other)
            assert here == there or FLOORS[there] < FLOORS[here], f"{name} imports {other}"


def test_the_published_code_imports_nothing_but_its_own_flat_files():
    for name, path in modules("modeling_moco").items():
        assert all(other.split(".")[0] == "modeling_moco" for other in imported(name, path)), name
        assert path.parent == ROOT / "modeling_moco"


def test_packages_import_each_other_one_way_only():
    arrows = {(room(name), room(other)) for name, path in modules("training").items() for other in imported(name, path)}
    assert not [(a, b) for a, b in arrows if a != b and (b, a) in arrows]


def test_no_folder_has_more_than_ten_modules():
    folders = [ROOT / "modeling_moco", *(path for path in (ROOT / "training").rglob("*") if path.is_dir())]
    for folder in [ROOT / "training", *folders]:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 10, folder


def test_one_module_alone_reaches_an_upload():
    for name, path in {**modules("training"), **modules("modeling_moco"), **modules("scripts")}.items():
        if name == "training.hub.repository":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            word = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
            assert word not in UPLOADS, f"{name} calls {word}"
            if isinstance(node, ast.ImportFrom):
                assert not {alias.name for alias in node.names} & UPLOADS, name


def overrides():
    """Every method of ours that replaces one of another library: (our class, name, the other class)."""
    for name in {**modules("training"), **modules("modeling_moco")}:
        for kind in vars(import_module(name)).values():
            if not inspect.isclass(kind) or kind.__module__ != name:
                continue
            for method, value in vars(kind).items():
                # `forward` is each module's own.
                if not inspect.isfunction(value) or method == "forward" or re.fullmatch(r"__\w+__", method):
                    continue
                for parent in kind.__mro__[1:]:
                    if method in vars(parent):
                        if parent.__module__.split(".")[0] not in ("training", "modeling_moco"):
                            yield kind, method, parent
                        break


OVERRIDES = sorted(overrides(), key=lambda found: (found[0].__module__, found[0].__name__, found[1]))


@pytest.mark.parametrize(("kind", "method", "parent"), OVERRIDES, ids=lambda x: getattr(x, "__name__", x))
def test_an_overridden_method_takes_every_argument_of_the_librarys(kind, method, parent):
    theirs, ours = (inspect.signature(getattr(x, method)) for x in (parent, kind))
    positional, named = [], {}
    for parameter in theirs.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = None
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            positional.append(parameter.name)
    required = [name for name in positional if theirs.parameters[name].default is inspect.Parameter.empty]
    optional = {name: None for name in positional if name not in required}
    ours.bind(*required, **optional, **named)  # callers name what is optional


def test_private_methods_are_overridden_only_where_no_public_hook_exists():
    private = {f"{k.__module__}.{k.__qualname__}.{m}" for k, m, _ in OVERRIDES if m.startswith("_")}
    assert private == PRIVATE_OVERRIDES


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_sections_with_flags_and_one_spelling_of_each(command, capsys):
    with pytest.raises(SystemExit) as end:
        import_module(f"training.commands.{COMMANDS[command][0]}").main(["--help"])
    assert end.value.code in (None, 0)
    text = capsys.readouterr().out
    assert text.startswith("usage: ")
    sections = re.split(r"\n(?=\S[^\n]*:\n)", text)[1:]
    for section in sections:
        entries = re.findall(r"^ {1,2}\S.*", section, re.M)
        if not section.startswith("options:"):  # argparse's own, which may have the help alone
            entries = [entry for entry in entries if not entry.startswith("  -h,")]
        assert entries, f"{command} has an empty section:\n{section}"
    flags = re.findall(r"^  (--[\w-]+)", text, re.M)
    assert len(flags) == len({flag.replace("-", "_") for flag in flags})
    for hidden in ("--remove_unused_columns", "--dataloader_drop_last", "--save_only_model", "--do_train"):
        assert hidden not in flags


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_in_order(command):
    module = import_module(f"training.commands.{COMMANDS[command][0]}")
    assert module.main.__wrapped__.__module__ == module.__name__
    assert module.main.__code__ is process.command(print).__code__  # the same wrapper


def test_an_installation_has_no_package_with_anybodys_name(monkeypatch):
    given = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["setup.py", "bdist_wheel"])
    monkeypatch.setattr("setuptools.setup", lambda **settings: given.update(settings))
    runpy.run_path(str(ROOT / "setup.py"))
    assert {name.partition(".")[0] for name in given["packages"]} == {"modeling_moco", "moco_hf"}
    name, _, function = given["entry_points"]["console_scripts"][0].partition(" = ")[2].partition(":")
    assert name.replace("moco_hf", "training") == training.commands.__name__
    assert callable(getattr(training.commands, function))


def test_the_console_command_names_its_subcommands(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["moco"])
    training.commands.main()
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", shown, re.M) for name in COMMANDS)
    monkeypatch.setattr("sys.argv", ["moco", "prtrain"])
    with pytest.raises(SystemExit):
        training.commands.main()
    assert "'prtrain' is unknown: choose one of pretrain" in capsys.readouterr().err


def test_the_public_names_are_the_documented_ones():
    documented = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    public = re.search(r"## Public names\n(.*?)(?=\n## |\Z)", documented, re.S)[1]
    assert set(re.findall(r"^- `(\w+)`", public, re.M)) == set(modeling_moco.__all__)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_may_read_and_run_code_that_nobody_can_move(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        steps = [step for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]) for step in steps)
        checkouts = [step for step in steps if step["uses"].startswith("actions/checkout@")]
        assert checkouts
        assert all(step["with"]["persist-credentials"] is False for step in checkouts)
