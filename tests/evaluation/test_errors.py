import numpy as np
import pytest

from finestsam.evaluation.coco_scores import Detections
from finestsam.evaluation.errors import Mistakes, count_mistakes, sum_mistakes
from finestsam.masks import encode_mask, rle_area, rle_box
from finestsam.records import Annotation, Record

SIZE = (60, 200)


def make_mask(left: int, right: int, top: int = 10, bottom: int = 40) -> dict:
    mask = np.zeros(SIZE, dtype=bool)
    mask[top:bottom, left:right] = True
    return encode_mask(mask)


def make_record(truth: list[dict], crowds: list[dict] = ()) -> Record:
    annotations = [
        Annotation(number, 1, rle["counts"], rle_area(rle), rle_box(rle)) for number, rle in enumerate(truth)
    ]
    return Record(1, "a.png", None, SIZE, annotations, [crowd["counts"] for crowd in crowds])


def count(truth: list[dict], found: list[dict], crowds: list[dict] = ()) -> dict[str, Mistakes]:
    detections = Detections(found, [0.9 - 0.1 * place for place in range(len(found))])
    return sum_mistakes(count_mistakes([make_record(truth, crowds)], [detections]))


def list_kinds(counts: dict[str, int]) -> dict[str, int]:
    return {kind: number for kind, number in counts.items() if number}


def test_each_kind_of_mistake_is_reported_from_the_others():
    truth = [make_mask(0, 20), make_mask(30, 50), make_mask(51, 71), make_mask(80, 140), make_mask(160, 180)]
    found = [
        make_mask(1, 20),  # finds the first
        make_mask(30, 71),  # merges the second and the third
        make_mask(80, 105),  # two pieces
        make_mask(115, 140),  # of the fourth
        make_mask(185, 199),  # nothing, beside the fifth, which is missed
    ]

    counts = count(truth, found)

    assert counts["all"].objects == {"found": 1, "merged": 2, "split": 1, "missed": 1}
    assert list_kinds(counts["all"].masks) == {"finding": 1, "merging": 1, "fragment": 2, "invented": 1}
    assert counts["medium"].objects["split"] == 1 and counts["small"].objects["merged"] == 2
    assert counts["large"].object_count == 0
    assert counts["all"].counting_error == 0


def test_a_second_mask_of_an_object_is_a_duplicate_and_one_in_a_crowd_does_not_count():
    truth, crowd = [make_mask(0, 40)], make_mask(100, 190)

    counts = count(truth, [make_mask(0, 40), make_mask(1, 39), make_mask(110, 130)], [crowd])["all"]

    assert counts.objects["found"] == 1
    assert list_kinds(counts.masks) == {"finding": 1, "duplicate": 1, "in_crowd": 1}
    assert counts.counting_error == 1


def test_nothing_found_and_nothing_there():
    assert count([make_mask(0, 20)], [])["all"].objects["missed"] == 1
    assert count([], [make_mask(0, 20)])["all"].masks["invented"] == 1
    assert count([], [])["all"] == Mistakes()


@pytest.mark.parametrize("seed", range(20))
def test_the_kinds_add_up_to_the_objects_and_to_the_masks(seed):
    """Whatever overlaps whatever, one kind holds for each, by the size that it has."""
    rng = np.random.default_rng(seed)

    def sample_masks(most: int) -> list[dict]:
        corners = rng.integers(0, (150, 40), (rng.integers(0, most + 1), 2))
        sides = rng.integers(1, (120, 50), corners.shape)
        return [
            make_mask(x, x + width, y, y + height)
            for (x, y), (width, height) in zip(corners.tolist(), sides.tolist(), strict=True)
        ]

    records = [make_record(sample_masks(8), sample_masks(2)) for _ in range(3)]
    masks = [sample_masks(12) for _ in records]
    found = [Detections(rles, rng.choice([0.2, 0.5, 0.9], len(rles)).tolist()) for rles in masks]

    images = count_mistakes(records, found)

    for record, one, counts in zip(records, found, images, strict=True):
        whole = sum_mistakes([counts])["all"]
        assert (whole.object_count, whole.mask_count) == (len(record.annotations), len(one.rles))
        assert whole.objects["found"] == whole.masks["finding"]
        for size, (low, high) in {"small": (0, 1024), "medium": (1024, 9216), "large": (9216, 1e9)}.items():
            assert counts[size].object_count == sum(low <= found.area < high for found in record.annotations)
            assert counts[size].mask_count == sum(low <= rle_area(rle) < high for rle in one.rles)
