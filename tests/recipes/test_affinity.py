import math

import pytest
import torch
from torch.nn import functional as F

from finestsam.data.cells import CROWD, PADDING
from recipes.builtin_weights.affinity import CELLS_PER_TOKEN, DISTANCES, AffinityHead, compute_affinity_loss

SIDE = 32
QUESTIONS = 1 + 2 * len(DISTANCES)
# Two objects, 12 cells wide and 24 high, a column without one between them, and padding at the right and below.
LABELS = torch.full((1, SIDE, SIDE), PADDING)
LABELS[0, :24, :28] = 0
LABELS[0, :24, :12] = 1
LABELS[0, :24, 13:25] = 2


def make_true_logits(labels: torch.Tensor, confidence: float) -> torch.Tensor:
    """Return the logits of somebody who knows, from plain loops."""
    _, height, width = labels.shape
    logits = torch.zeros(1, QUESTIONS, height, width)
    for y in range(height):
        for x in range(width):
            here = labels[0, y, x]
            logits[0, 0, y, x] = confidence if here > 0 else -confidence
            for number, distance in enumerate(DISTANCES):
                for channel, (row, column) in (
                    (1 + 2 * number, (y + distance, x)),
                    (2 + 2 * number, (y, x + distance)),
                ):
                    is_same = here > 0 and row < height and column < width and labels[0, row, column] == here
                    logits[0, channel, y, x] = confidence if is_same else -confidence
    return logits


def test_who_knows_has_no_loss_and_who_knows_nothing_has_that_of_a_coin():
    assert compute_affinity_loss(make_true_logits(LABELS, 30.0), LABELS).item() < 1e-6
    nothing = torch.zeros(1, QUESTIONS, SIDE, SIDE)
    torch.testing.assert_close(compute_affinity_loss(nothing, LABELS), torch.tensor([math.log(2)]))
    assert compute_affinity_loss(make_true_logits(LABELS, -5.0), LABELS).item() > 4.9


def test_borders_weigh_as_much_as_all_that_lies_within():
    logits = make_true_logits(LABELS, 30.0)
    logits[:, 2] = 30.0  # right neighbours are alike everywhere: wrong along the borders alone

    wrong = compute_affinity_loss(logits, LABELS).item()

    assert math.isclose(wrong, (30 / 2) / QUESTIONS, rel_tol=1e-5)


def test_pairs_of_which_neither_is_in_an_object_do_not_count():
    logits = make_true_logits(LABELS, 3.0)
    changed = logits.clone()
    is_nothing = (LABELS[:, :, :-1] == 0) & (LABELS[:, :, 1:] == 0)
    changed[:, 2, :, :-1] = torch.where(is_nothing, 100.0, logits[:, 2, :, :-1])

    assert is_nothing.any()
    torch.testing.assert_close(compute_affinity_loss(changed, LABELS), compute_affinity_loss(logits, LABELS))


def test_a_new_head_moves_no_embedding():
    embeddings = torch.randn(1, 32, 8, 8, requires_grad=True)

    compute_affinity_loss(AffinityHead(32)(embeddings), LABELS).sum().backward()

    assert embeddings.grad.abs().max() == 0


@pytest.mark.parametrize("mark", [PADDING, CROWD])
def test_what_is_predicted_in_the_padding_or_in_a_crowd_does_not_count(mark):
    labels = torch.where(LABELS == PADDING, mark, LABELS)
    logits = make_true_logits(labels, 3.0)
    changed = torch.where(labels[:, None] == mark, 100.0, logits)

    torch.testing.assert_close(compute_affinity_loss(changed, labels), compute_affinity_loss(logits, labels))


def test_an_image_that_is_all_padding_has_no_loss():
    assert (
        compute_affinity_loss(torch.zeros(1, QUESTIONS, SIDE, SIDE), torch.full((1, SIDE, SIDE), PADDING)).item() == 0
    )


def test_each_token_predicts_its_own_cells():
    head = AffinityHead(8)
    torch.nn.init.normal_(head.weight)
    embeddings = torch.randn(2, 8, 4, 4)

    logits = head(embeddings)

    assert logits.shape == (2, QUESTIONS, 16, 16)
    changed = embeddings.clone()
    changed[0, :, 1, 2] += 1
    cells = (head(changed) != logits).any(dim=1)[0]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[CELLS_PER_TOKEN : 2 * CELLS_PER_TOKEN, 2 * CELLS_PER_TOKEN : 3 * CELLS_PER_TOKEN] = True
    assert torch.equal(cells, expected)


def test_the_loss_can_be_learnt():
    torch.manual_seed(0)
    head, embeddings = AffinityHead(32), torch.randn(1, 32, 8, 8)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(60):
        loss = compute_affinity_loss(head(embeddings), LABELS).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert F.relu(loss).item() < 0.2
