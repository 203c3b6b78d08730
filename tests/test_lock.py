"""requirements.lock has all that setup.py asks for, within its ranges, with hashes, and from no place of its own."""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
LOCKED = dict(re.findall(r"^([\w.-]+)==([\w.]+)", LOCK, re.M))


def asked_for() -> list[str]:
    """What setup.py and pyproject.toml name for a development set-up."""
    (call,) = (
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "setup"
    )
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = ast.literal_eval(arguments["extras_require"])
    (built_with,) = re.findall(r'^requires = \["(.+)"\]', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    return [*ast.literal_eval(arguments["install_requires"]), *extras["dev"], built_with]


@pytest.mark.parametrize("asked", asked_for())
def test_a_locked_version_is_one_that_is_allowed(asked):
    requirement = Requirement(asked)
    assert LOCKED[requirement.name.lower()] in requirement.specifier, f"run `make lock`: {requirement}"


def test_every_version_has_hashes_and_comes_from_the_users_own_index():
    entries = [entry for entry in re.split(r"\n(?=\S)", LOCK.strip()) if not entry.startswith("#")]
    assert len(entries) > 100
    for entry in entries:
        assert re.match(r"[\w.-]+==\S+( ; .+)? \\\n    --hash=sha256:[0-9a-f]{64}", entry), entry[:100]
    assert "://" not in LOCK


def test_a_set_up_and_the_checks_install_what_is_locked():
    for path in ("Makefile", ".github/workflows/tests.yml"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert "--require-hashes --requirement" in text, path
        assert "--no-deps --no-build-isolation --editable ." in text, path
