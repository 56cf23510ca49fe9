"""The built-in weights made anew, with a thousandth of the scenes and steps."""

import pytest
import torch

from finestsam.builtin import make as module
from finestsam.builtin.make import SOURCE, STAGES, make
from finestsam.model.card import read_card
from finestsam.model.weights import identify, load_state_dict

SHARE = 0.001


@pytest.mark.slow
def test_weights_are_made_from_nothing_and_a_stopped_making_goes_on(tmp_path, monkeypatch):
    run_command, commands = module.run_command, []

    def run(command: list[str]) -> int:
        commands.append(command)
        return 143 if len(commands) == 2 else run_command(command)

    monkeypatch.setattr(module, "run_command", run)
    with pytest.raises(SystemExit, match="details: stopped; the same command goes on with it"):
        make(tmp_path, SHARE)

    weights = make(tmp_path, SHARE)

    assert ["--resume" in command for command in commands] == [False, False, True, *[False] * (len(STAGES) - 1)]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in {stage.name for stage in STAGES}) == sorted(
        stage.name for stage in STAGES
    )
    content, card = load_state_dict(weights), read_card(weights)
    assert identify(content) == "vit_tiny"
    assert {value.dtype for value in content.values()} == {torch.float16}
    assert weights.stat().st_size < 12e6
    assert (card.started_from, card.started_from_sha256) == (SOURCE, None)
    assert card.image_size == 768 and card.multimask_output
