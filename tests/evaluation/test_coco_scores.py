import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from finestsam.evaluation.coco_scores import TRACED_RECALLS, CocoScorer, Detections, score_detections
from finestsam.masks import encode_mask, rle_area, rle_box, rle_to_json
from finestsam.records import Annotation, Record

SIZE = (200, 300)


def draw(render_from: np.random.Generator, count: int) -> list[dict]:
    """Return rectangles of all of COCO's sizes."""
    rles = []
    for _ in range(count):
        height, width = render_from.integers(4, 150, 2)
        y, x = render_from.integers(0, SIZE[0] - 4), render_from.integers(0, SIZE[1] - 4)
        mask = np.zeros(SIZE, dtype=bool)
        mask[y : y + height, x : x + width] = True
        rles.append(encode_mask(mask))
    return rles


def move(rle: dict, by: int) -> dict:
    from finestsam.masks import decode_rle

    return encode_mask(np.roll(decode_rle(rle), by, axis=1))


def make_record(rles: list[dict], crowds: list[dict] = ()) -> Record:
    annotations = [Annotation(i, 1, rle["counts"], rle_area(rle), rle_box(rle)) for i, rle in enumerate(rles)]
    return Record(1, "a.png", Path("a.png"), SIZE, annotations, [rle["counts"] for rle in crowds])


@pytest.fixture
def images():
    """Objects, crowds and detections that are shifted, missing, wrong, of one score, and in crowds."""
    rng = np.random.default_rng(0)
    records, found = [], []
    for _ in range(12):
        objects, crowds = draw(rng, rng.integers(0, 9)), draw(rng, rng.integers(0, 2))
        moved = [move(rle, int(rng.integers(0, 8))) for rle in objects if rng.random() > 0.2]
        rles = moved + draw(rng, rng.integers(0, 6)) + crowds
        records.append(make_record(objects, crowds))
        found.append(Detections(rles, rng.choice([0.5, 0.7, 0.9], len(rles)).tolist()))
    return records, found


def write_files(records, found, folder):
    """Write the truth and what was found as COCO's files, and return their paths."""
    images, annotations, results = [], [], []
    for number, (record, one) in enumerate(zip(records, found, strict=True), start=1):
        images.append({"id": number, "height": SIZE[0], "width": SIZE[1], "file_name": f"{number}.png"})
        objects = [(annotation.counts, 0) for annotation in record.annotations] + [(c, 1) for c in record.crowds]
        for counts, iscrowd in objects:
            rle = {"size": list(SIZE), "counts": counts}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": iscrowd,
                 "segmentation": rle_to_json(rle), "area": rle_area(rle), "bbox": rle_box(rle)}
            )  # fmt: skip
        for rle, score in zip(one.rles, one.scores, strict=True):
            results.append({"image_id": number, "category_id": 1, "segmentation": rle_to_json(rle), "score": score})
    truth, outputs = folder / "truth.json", folder / "results.json"
    truth.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]})
    )
    outputs.write_text(json.dumps(results))
    return str(truth), str(outputs)


# In the order of pycocotools' summary. No image has more than a hundred detections, its limit for sizes.
SUMMARY = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", None, "ar_10", "ar_100",
    "ar_1000_small", "ar_1000_medium", "ar_1000_large",
)  # fmt: skip


def assert_same_scores(scores, stats):
    for name, expected in zip(SUMMARY, stats[: len(SUMMARY)], strict=True):
        if name:
            assert scores[name] == pytest.approx(expected, abs=1e-12), name
    assert 0.1 < scores["ap"] < 0.9


def test_scores_are_those_of_pycocotools_called_plainly(images, tmp_path):
    truth, outputs = write_files(*images, tmp_path)
    coco = COCO(truth)
    evaluator = COCOeval(coco, coco.loadRes(outputs), "segm")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()

    assert_same_scores(score_detections(*images), evaluator.stats)


def test_scores_are_those_of_faster_coco_eval(images, tmp_path):
    """Another implementation than pycocotools', in C++."""
    faster = pytest.importorskip("faster_coco_eval")
    truth, outputs = write_files(*images, tmp_path)
    coco = faster.COCO(truth)
    evaluator = faster.COCOeval_faster(coco, coco.loadRes(outputs), "segm")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()

    assert_same_scores(score_detections(*images), evaluator.stats)


def test_the_traced_precision_is_what_average_precision_is_the_mean_of(images):
    scorer = CocoScorer(*images)

    traced = scorer.trace_precision()

    scores = scorer.score()
    assert traced[0.5].mean() == pytest.approx(scores["ap50"], abs=1e-12)
    assert traced[0.75].mean() == pytest.approx(scores["ap75"], abs=1e-12)
    assert (np.diff(traced[0.5]) <= 0).all() and len(traced[0.5]) == len(TRACED_RECALLS)
    assert CocoScorer([make_record([])], [Detections([], [])]).trace_precision() == {}


def test_a_draw_of_images_scores_what_a_dataset_of_them_would(images):
    records, found = images
    positions = [3, 3, 0, 7, 7, 7, 11, 5]

    drawn = CocoScorer(records, found).resample(positions)

    expected = score_detections([records[place] for place in positions], [found[place] for place in positions])
    for name, value in drawn.items():
        assert value == pytest.approx(expected[name], abs=1e-12), name


def test_what_is_found_exactly_scores_one():
    rles = [encode_mask(np.arange(60_000).reshape(SIZE) // 500 == number) for number in range(4)]

    scores = score_detections([make_record(rles)], [Detections(rles, [0.9, 0.8, 0.7, 0.6])])

    assert scores["ap"] == scores["ar_10"] == scores["ar_1000"] == pytest.approx(1)


def test_no_mask_is_cut_off():
    """1 200 wrong masks stand before the right one."""
    (right,) = draw(np.random.default_rng(0), 1)
    wrong = encode_mask(np.arange(60_000).reshape(SIZE) == 0)

    scores = score_detections([make_record([right])], [Detections([wrong] * 1200 + [right], [0.9] * 1200 + [0.1])])

    assert scores["ap"] == pytest.approx(1 / 1201, rel=0.01)
    assert scores["ar_1000"] == 0


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong():
    rng = np.random.default_rng(0)
    objects, inside = draw(rng, 2), encode_mask(np.arange(60_000).reshape(SIZE) < 900)
    crowd = encode_mask(np.arange(60_000).reshape(SIZE) < 3000)
    found = Detections([inside, *objects], [0.95, 0.9, 0.8])

    assert score_detections([make_record(objects, [crowd])], [found])["ap"] == pytest.approx(1)
    assert score_detections([make_record(objects)], [found])["ap"] < 1


@pytest.mark.parametrize("crowd_count", [0, 1])
def test_without_objects_there_is_nothing_to_score(crowd_count):
    rles = draw(np.random.default_rng(0), 2)

    assert score_detections([make_record([], rles[:crowd_count])], [Detections(rles, [0.5, 0.5])]) == {}


def test_nothing_found_scores_zero():
    record = make_record(draw(np.random.default_rng(0), 3))

    scores = score_detections([record], [Detections([], [])])

    assert scores["ap"] == scores["ar_1000"] == 0


def test_a_score_that_is_no_number_is_refused():
    rles = draw(np.random.default_rng(0), 1)

    with pytest.raises(ValueError, match="nan"):
        score_detections([make_record(rles)], [Detections(rles, [float("nan")])])
