"""A run that claims its folder."""

import pytest
from parsed_recipes import CPU, LAYOUT, PLACE

from training.engine.checkpoints import claim_output_dir
from training.recipe import parse_pretrain


@pytest.fixture
def claim(tmp_path):
    def claim(*flags, folder=tmp_path / "run", place=PLACE):
        args = parse_pretrain(["--temperature", "0.2", "--output_dir", str(folder), *flags, *CPU])
        return claim_output_dir(args.training, LAYOUT, args.settings, args.defaults, args.about, place)

    return claim
