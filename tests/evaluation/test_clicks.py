import pytest
import torch

from finestsam.config import build_config
from finestsam.data.dataset import SampleDataset, SampleSettings, collate
from finestsam.evaluation.prompt_scorer import average_clicks, measure_clicks
from finestsam.prediction.embedder import Embedder


@pytest.fixture
def batches(records):
    config = build_config({})
    dataset = SampleDataset(records[:2], SampleSettings(64, 16, 0, config.prompts, config.dataset))
    return [collate([dataset[(0, place)]]) for place in range(2)]


def test_chunks_change_nothing_and_only_the_reported_counts_are_given(tiny_sam, batches):
    embedder = Embedder(tiny_sam)

    one, all_together = (average_clicks(measure_clicks(embedder, batches, size, clicks=3)) for size in (1, 1000))

    assert average_clicks([]) == {}
    assert set(one) == {1, 2, 3}
    for count, value in one.items():
        assert value == pytest.approx(all_together[count], abs=1e-6)
        assert 0 <= value <= 1


def test_a_model_that_returns_the_clicked_pixels_gets_better_with_each_click(tiny_sam, batches, monkeypatch):
    """A stand-in for a decoder: a pixel belongs to the object if the click next to it is a positive one."""
    embedder = Embedder(tiny_sam)
    seen = []

    def output(embedding, prompts):
        side = tiny_sam.image_size // 4
        y, x = torch.meshgrid(torch.arange(side) * 4.0, torch.arange(side) * 4.0, indexing="ij")
        distance = (x - prompts.points[..., 0, None, None]) ** 2 + (y - prompts.points[..., 1, None, None]) ** 2
        nearest = distance.masked_fill((prompts.labels < 0)[..., None, None], torch.inf).argmin(dim=1)
        votes = torch.take_along_dim(2.0 * prompts.labels[..., None, None] - 1, nearest[:, None], dim=1)
        seen.append((prompts.points.shape[1], None if prompts.mask_logits is None else prompts.mask_logits.shape))
        return type("P", (), {"logits": votes, "scores": torch.ones(len(votes), 1)})

    monkeypatch.setattr(type(tiny_sam), "forward", lambda self, *args: output(*args))

    found = average_clicks(measure_clicks(embedder, batches, 1000, clicks=8))

    assert found[8] > found[1]
    assert [count for count, _ in seen[:8]] == list(range(1, 9))
    assert seen[0][1] is None and seen[1][1] is not None  # the output before goes along
