"""The convert script, as it ends well and as it refuses."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def convert(script, capsys):
    """Run the script; what it prints."""

    def run(*words) -> str:
        capsys.readouterr()  # what the test itself has printed
        script("convert").main([str(word) for word in words])
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


@pytest.fixture
def refuse(script, capsys):
    """Run the script, which is to end with one line on standard error; that line."""

    def run(*words) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            script("convert").main([str(word) for word in words])
        assert end.value.code == 2
        error = capsys.readouterr().err.removesuffix("\n")
        assert error.startswith("error: ")
        assert error.isprintable()
        return error.removeprefix("error: ")

    return run
