import math

import torch
from torch.nn import functional as F

from finestsam.training.affinity import CELLS_PER_TOKEN, DISTANCES, AffinityHead, affinity_loss

# Two objects of 6 x 12 cells, a column without one between them, and padding at the right.
LABELS = torch.full((1, 16, 16), -1)
LABELS[0, :12, :14] = 0
LABELS[0, :12, :6] = 1
LABELS[0, :12, 7:13] = 2


def answer_truly(labels: torch.Tensor, confidence: float) -> torch.Tensor:
    """Return the logits of somebody who knows, from plain loops."""
    _, height, width = labels.shape
    logits = torch.zeros(1, 1 + 2 * len(DISTANCES), height, width)
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
    assert affinity_loss(answer_truly(LABELS, 30.0), LABELS).item() < 1e-6
    nothing = torch.zeros(1, 7, 16, 16)
    torch.testing.assert_close(affinity_loss(nothing, LABELS), torch.tensor([math.log(2)]))
    assert affinity_loss(answer_truly(LABELS, -5.0), LABELS).item() > 4.9


def test_what_is_answered_in_the_padding_does_not_count():
    logits = answer_truly(LABELS, 3.0)
    changed = torch.where(LABELS[:, None] == -1, 100.0, logits)

    torch.testing.assert_close(affinity_loss(changed, LABELS), affinity_loss(logits, LABELS))


def test_a_picture_that_is_all_padding_has_no_loss():
    assert affinity_loss(torch.zeros(1, 7, 16, 16), torch.full((1, 16, 16), -1)).item() == 0


def test_each_token_answers_for_its_own_cells():
    head = AffinityHead(8)
    embeddings = torch.randn(2, 8, 4, 4)

    logits = head(embeddings)

    assert logits.shape == (2, 7, 16, 16)
    changed = embeddings.clone()
    changed[0, :, 1, 2] += 1
    cells = (head(changed) != logits).any(dim=1)[0]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[CELLS_PER_TOKEN : 2 * CELLS_PER_TOKEN, 2 * CELLS_PER_TOKEN : 3 * CELLS_PER_TOKEN] = True
    assert torch.equal(cells, expected)


def test_the_loss_can_be_learnt():
    torch.manual_seed(0)
    head, embeddings = AffinityHead(16), torch.randn(1, 16, 4, 4)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(60):
        loss = affinity_loss(head(embeddings), LABELS).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert F.relu(loss).item() < 0.2
