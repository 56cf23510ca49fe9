import numpy as np

from finestsam.data.index import Annotation, Record
from finestsam.evaluation.coco_scores import Detections
from finestsam.evaluation.mistakes import count_mistakes, sum_mistakes
from finestsam.masks import encode_mask, rle_area, rle_box

SIZE = (60, 200)


def make_mask(left: int, right: int, top: int = 10, bottom: int = 40) -> dict:
    mask = np.zeros(SIZE, dtype=bool)
    mask[top:bottom, left:right] = True
    return encode_mask(mask)


def count(truth: list[dict], found: list[dict], crowds: list[dict] = ()) -> dict:
    annotations = [
        Annotation(number, 1, rle["counts"], rle_area(rle), rle_box(rle)) for number, rle in enumerate(truth)
    ]
    record = Record(1, "a.png", None, SIZE, annotations, [crowd["counts"] for crowd in crowds])
    detections = Detections(found, [0.9 - 0.1 * place for place in range(len(found))])
    return sum_mistakes(count_mistakes([record], [detections]))


def test_each_kind_of_mistake_is_told_from_the_others():
    truth = [make_mask(0, 20), make_mask(30, 50), make_mask(51, 71), make_mask(80, 140), make_mask(160, 180)]
    found = [
        make_mask(1, 20),  # finds the first
        make_mask(30, 71),  # merges the second and the third
        make_mask(80, 105),  # two pieces
        make_mask(115, 140),  # of the fourth
        make_mask(185, 199),  # nothing, beside the fifth, which is missed
    ]

    counts = count(truth, found)

    whole = counts["all"]
    assert (whole.found, whole.merged, whole.split, whole.missed, whole.spurious) == (1, 2, 1, 1, 1)
    assert whole.objects == 5
    assert counts["medium"].split == 1 and counts["small"].merged == 2
    assert counts["large"].objects == 0


def test_a_second_mask_of_an_object_is_not_spurious_and_one_in_a_crowd_neither():
    truth, crowd = [make_mask(0, 40)], make_mask(100, 190)

    counts = count(truth, [make_mask(0, 40), make_mask(1, 39), make_mask(110, 130)], [crowd])

    assert counts["all"].found == 1 and counts["all"].spurious == 0


def test_nothing_found_and_nothing_there():
    assert count([make_mask(0, 20)], [])["all"].missed == 1
    assert count([], [make_mask(0, 20)])["all"].spurious == 1
    assert count([], [])["all"].objects == 0
