"""The built-in weights made anew, with a thousandth of the scenes and steps."""

import pytest
import torch

from finestsam.model.card import read_card
from finestsam.model.weights import identify, load_state_dict
from finestsam.training.step import Stepper
from recipes.builtin_weights import make as module
from recipes.builtin_weights.make import SOURCE, STAGES, make

SHARE = 0.001


@pytest.mark.slow
def test_weights_are_made_from_nothing_and_a_stopped_making_goes_on(tmp_path, monkeypatch):
    train_stage, commands = module.train_stage, []

    def run(stepper_kind: type[Stepper], command: list[str]) -> int:
        commands.append(command)
        return 143 if len(commands) == 2 else train_stage(stepper_kind, command)

    monkeypatch.setattr(module, "train_stage", run)
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
