import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_vivid_sam, files_limited_to, list_shown
from PIL import Image
from pycocotools.coco import COCO

from finestsam.cli import main
from finestsam.data.synthetic import render_scene
from finestsam.errors import UserError
from finestsam.images.files import read_image, write_image
from finestsam.masks import decode_rle, distance_inside, rle_area, rle_box, rle_from_json
from finestsam.model.card import Card, write_card
from finestsam.prediction.files import find_images, name_overlays
from finestsam.prediction.generator import generate_masks

# Random weights give low scores and vague masks with the same box, which these let through.
THRESHOLDS = {
    "generator.points_per_side": 4,
    "generator.pred_iou_thresh": 0,
    "generator.stability_score_thresh": 0.3,
    "generator.stability_score_offset": 0.05,
    "generator.box_nms_thresh": 1,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(build_vivid_sam().state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with images/ of three shapes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for index, size in enumerate([(64, 96), (80, 60), (70, 70)]):
        write_image(tmp_path / "images" / f"scene_{index}.png", render_scene(0, index, size).image)
    return tmp_path


@pytest.fixture
def predict(weights, capsys):
    """Run the command and return its exit code, stdout and stderr."""

    def run(*inputs, **settings):
        flags = {"model.checkpoint": weights, "device": "cpu", **THRESHOLDS} | settings
        words = ["--mode", "predict", "--input", *map(str, inputs)]
        words += [f"--{name}={value}" for name, value in flags.items()]
        code = main(words)
        return code, *capsys.readouterr()

    return run


def load(path):
    def refuse(literal):
        raise AssertionError(f"{literal} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_one_image_gives_an_overlay_of_its_size_and_a_json(predict, folder):
    code, out, err = predict("images/scene_0.png")

    assert (code, err) == (0, "")
    assert list_shown(folder / "out") == ["predictions.json", "scene_0.png"]
    image, overlay = (read_image(folder / place / "scene_0.png") for place in ("images", "out"))
    assert overlay.shape == image.shape and (overlay != image).any()
    count = len(load(folder / "out/predictions.json")["annotations"])
    assert "tiny.pth" in out and "vit_tiny_test" in out
    assert "out/scene_0.png" in out and "out/predictions.json" in out
    assert f"{count} masks in 1 image, " in out and " s an image" in out


def test_the_json_is_a_coco_dataset_that_pycocotools_reads_as_results(predict, folder):
    predict("images")

    content = load(folder / "out/predictions.json")
    coco = COCO(folder / "out/predictions.json")
    results = coco.loadRes(copy.deepcopy(content["annotations"]))  # it writes into what it is given
    assert [image["file_name"] for image in content["images"]] == ["scene_0.png", "scene_1.png", "scene_2.png"]
    assert [(image["width"], image["height"]) for image in content["images"]] == [(96, 64), (60, 80), (70, 70)]
    assert content["categories"] == [{"id": 1, "name": "object"}]
    assert [annotation["id"] for annotation in content["annotations"]] == list(range(1, len(results.anns) + 1))
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    for annotation in content["annotations"]:
        rle = rle_from_json(annotation["segmentation"])
        assert rle["size"] == sizes[annotation["image_id"]]
        assert annotation["area"] == rle_area(rle) == coco.annToMask(annotation).sum()
        assert annotation["bbox"] == rle_box(rle)
        assert annotation["score"] == annotation["predicted_iou"]
        assert 0.3 <= annotation["stability_score"] <= 1
        assert annotation["iscrowd"] == 0 and annotation["category_id"] == 1
        assert 0 < annotation["point"][0] < rle["size"][1] and 0 < annotation["point"][1] < rle["size"][0]


@pytest.mark.parametrize("polygons", [False, True])
def test_other_programs_take_the_json(predict, folder, polygons):
    """By what their readers ask for: datumaro, which CVAT reads with, FiftyOne and label-studio-converter."""
    predict("images", polygons=polygons)

    content = load(folder / "out/predictions.json")
    images = {image["id"]: image for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert len(images) == len(content["images"]) and len(content["annotations"]) > 3
    for image in images.values():
        assert (type(image["id"]), type(image["width"]), type(image["height"])) == (int, int, int)
        assert (folder / "images" / image["file_name"]).is_file()
    assert len({annotation["id"] for annotation in content["annotations"]}) == len(content["annotations"])
    for annotation in content["annotations"]:
        assert all(type(annotation[name]) is int for name in ("id", "image_id", "category_id", "iscrowd", "area"))
        assert annotation["category_id"] in names and type(annotation["score"]) is float
        image = images[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        assert 0 <= x < x + width <= image["width"] and 0 <= y < y + height <= image["height"]
        segmentation = annotation["segmentation"]
        if not polygons:
            assert segmentation["size"] == [image["height"], image["width"]]
            assert type(segmentation["counts"]) is str
            continue
        for part in segmentation:
            assert len(part) % 2 == 0 and len(part) >= 6
            assert min(part) >= 0 and max(part[0::2]) <= image["width"] and max(part[1::2]) <= image["height"]


@pytest.mark.parametrize("polygons", [False, True])
def test_a_second_reader_of_coco_files_finds_the_same_masks(predict, folder, polygons):
    faster = pytest.importorskip("faster_coco_eval")
    predict("images", polygons=polygons)
    path = folder / "out/predictions.json"

    ours, theirs = COCO(path), faster.COCO(str(path))
    results = theirs.loadRes(copy.deepcopy(load(path)["annotations"]))

    assert len(results.anns) == len(ours.anns) > 3
    for number, annotation in ours.anns.items():
        np.testing.assert_array_equal(theirs.annToMask(theirs.anns[number]), ours.annToMask(annotation))


def test_the_same_images_give_the_same_bytes(predict, folder):
    first, second = (predict("images", out_dir=name) and (folder / name) for name in ("first", "second"))

    for name in list_shown(first):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_an_exif_rotated_image_is_predicted_upright(predict, folder):
    image, exif = Image.open("images/scene_0.png"), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save("turned.jpg", exif=exif, quality=95)

    predict("turned.jpg")

    content = load(folder / "out/predictions.json")
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (64, 96)
    assert read_image(folder / "out/turned.png").shape == (96, 64, 3)
    assert all(a["segmentation"]["size"] == [96, 64] for a in content["annotations"])


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg")])
def test_images_of_every_kind_get_an_overlay_in_colour(predict, folder, mode, suffix):
    Image.open("images/scene_0.png").convert(mode).save(f"kind.{suffix}")

    code, _, _ = predict(f"kind.{suffix}", opacity=1)

    overlay = read_image(folder / "out/kind.png")
    assert code == 0
    assert overlay.shape == (64, 96, 3) and np.ptp(overlay.astype(int), axis=2).max() > 50


def test_an_image_without_masks_is_copied_and_the_threshold_named(predict, folder):
    code, out, err = predict("images/scene_0.png", **{"generator.pred_iou_thresh": 0.99, "generator.crop_n_layers": 1})

    content = load(folder / "out/predictions.json")
    assert (code, err) == (0, "")
    assert content["annotations"] == [] and len(content["images"]) == 1
    assert (read_image(folder / "out/scene_0.png") == read_image(folder / "images/scene_0.png")).all()
    assert "images/scene_0.png: no masks: 240 of 240 candidates have a predicted IoU of at most" in out
    assert "generator.pred_iou_thresh 0.99 (best 0." in out
    assert "0 masks in 1 image" in out


def test_one_broken_image_among_many_is_named_and_the_rest_is_done(predict, folder):
    whole = (folder / "images/scene_1.png").read_bytes()
    (folder / "images/scene_1.png").write_bytes(whole[: len(whole) // 2])

    code, out, err = predict("images")

    assert code == 0
    assert err.count("\n") == 1 and "finestsam: skipped images/scene_1.png: truncated or broken image" in err
    assert list_shown(folder / "out") == [
        "predictions.json",
        "scene_0.png",
        "scene_2.png",
    ]
    assert " in 2 images" in out and "(2 overlays)" in out


def test_only_broken_images_are_an_error(predict, folder):
    (folder / "a.png").write_text("<html>")
    (folder / "b.png").write_bytes(b"")

    code_of_one, _, err_of_one = predict("a.png")
    code_of_both, _, err_of_both = predict("a.png", "b.png")

    assert (code_of_one, code_of_both) == (2, 2)
    assert err_of_one.startswith("finestsam: a.png: not an image") and err_of_one.count("\n") == 1
    assert err_of_both.splitlines()[-1] == "finestsam: none of the 2 images can be predicted"
    assert not (folder / "out/predictions.json").exists()


def test_an_image_too_thin_for_the_model_is_an_error_in_one_line(predict, folder):
    Image.new("RGB", (4000, 1)).save("thin.png")

    code, _, err = predict("thin.png")

    assert (code, err) == (2, "finestsam: thin.png: 4000 x 1 pixels shrink to nothing at 64\n")


def test_outputs_beside_the_images_overwrite_none_and_are_not_predicted_the_next_time(predict, folder):
    shutil.copy("images/scene_0.png", "images/scene_1.jpg")
    before = {path.name: path.read_bytes() for path in (folder / "images").iterdir()}

    codes = [predict("images", out_dir="images")[0] for _ in range(2)]

    after = {path.name: path.read_bytes() for path in (folder / "images").iterdir()}
    assert codes == [0, 0]
    assert {name: after[name] for name in before} == before
    assert [name for name in sorted(after.keys() - before.keys()) if not name.startswith(".")] == [
        "predictions.json",
        "scene_0.finestsam.png",
        "scene_1.finestsam.png",
        "scene_1_2.finestsam.png",
        "scene_2.finestsam.png",
    ]


def test_thresholds_and_category_come_from_the_card_beside_the_weights(predict, folder, weights):
    shutil.copy(weights, "best.pth")
    card = Card("vit_tiny_test", 64, False, ["cell"], generator={"pred_iou_thresh": 0.97, "points_per_side": 2})
    write_card(folder / "best.pth", card)

    _, out, _ = predict(
        "images/scene_0.png",
        **{"model.checkpoint": "best.pth", "generator.pred_iou_thresh": "null", "generator.points_per_side": "null"},
    )

    assert "4 of 4 candidates have a predicted IoU of at most generator.pred_iou_thresh 0.97" in out
    content = load(folder / "out/predictions.json")
    assert content["categories"] == [{"id": 1, "name": "cell"}]
    assert content["info"]["generator"]["pred_iou_thresh"] == 0.97


def test_weights_whose_thresholds_nobody_chose_are_named_with_the_remedy(predict, folder, weights):
    thresholds = {"generator.pred_iou_thresh": "null", "generator.stability_score_thresh": "null"}
    shutil.copy(weights, "best.pth")
    write_card(folder / "best.pth", Card("vit_tiny_test", 64, True, []))

    code, _, err = predict("images/scene_0.png", **{"model.checkpoint": "best.pth"} | thresholds)

    assert code == 0
    assert re.search("thresholds were never chosen for these weights.*--mode evaluate --dataset FOLDER", err)
    write_card(folder / "best.pth", Card("vit_tiny_test", 64, True, [], generator={"pred_iou_thresh": 0.5}))
    assert predict("images/scene_0.png", **{"model.checkpoint": "best.pth"} | thresholds)[2] == ""


def test_inputs_that_name_no_image_are_reported_together_before_anything_is_loaded(predict, folder):
    (folder / "clip.MP4").write_bytes(b"")
    (folder / "empty").mkdir()

    code, _, err = predict("missing.png", "no*.png", "clip.MP4", "empty", **{"model.checkpoint": "missing.pth"})

    assert code == 2
    assert err.splitlines() == [
        "finestsam: --input missing.png: no such file or folder",
        "finestsam: --input no*.png: no image matches this pattern",
        "finestsam: --input clip.MP4: a video; cut it into images first, as in: ffmpeg -i video.mp4 frames/%05d.png",
        "finestsam: --input empty: no image in this folder; for those of its subfolders ask for 'empty/**/*'",
    ]


def test_an_out_dir_that_is_a_file_is_an_error(predict, folder):
    (folder / "taken").write_text("")

    code, _, err = predict("images", out_dir="taken")

    assert code == 2
    assert err == "finestsam: out_dir taken is a file, expected a folder\n"


def test_an_overlay_that_cannot_be_written_is_an_error(predict, folder):
    with files_limited_to(1000):
        code, _, err = predict("images/scene_0.png", **{"store.max_gigabytes": "0"})

    assert code == 2
    assert err == "finestsam: out/scene_0.png: cannot be written: File too large\n"


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["link", "hard link", "link to a link"])
def test_links_to_images_in_the_out_dir_leave_these_as_they_are(predict, folder, kind):
    (folder / "links").mkdir()
    for path in (folder / "images").iterdir():
        if kind == "hard link":
            (folder / "links" / path.name).hardlink_to(path)
        else:
            (folder / "links" / path.name).symlink_to(path)
    if kind == "link to a link":
        (folder / "more").symlink_to(folder / "links")
    before = snapshot(folder)

    code, _, _ = predict("more" if kind == "link to a link" else "links", out_dir="images")

    assert code == 0
    assert {path: content for path, content in snapshot(folder).items() if path in before} == before
    assert [f"scene_{number}.finestsam.png" for number in range(3)] == [
        name for name in list_shown(folder / "images") if ".finestsam" in name
    ]


@pytest.mark.parametrize("taken", ["scene_0.png", "scene_0.PNG", "a link", "a folder"])
def test_a_file_of_somebody_in_the_out_dir_is_not_replaced_by_an_overlay(predict, folder, taken):
    (folder / "out").mkdir()
    theirs = folder / "out" / (taken if taken.startswith("scene") else "scene_0.png")
    if taken == "a link":
        theirs.symlink_to(folder / "images/scene_2.png")
    elif taken == "a folder":
        theirs.mkdir()
        (theirs / "holiday.png").touch()
    else:
        shutil.copy("images/scene_1.png", theirs)
    before = snapshot(folder)

    first = predict("images/scene_0.png")[0]
    shown = list_shown(folder / "out")
    second = predict("images/scene_0.png")[0]

    assert (first, second) == (0, 0)
    after = snapshot(folder)
    assert {path: after[path] for path in before} == before
    if taken != "scene_0.PNG":  # another file here, and the same on other systems
        assert shown == ["predictions.json", "scene_0.finestsam.png", "scene_0.png"]
    assert list_shown(folder / "out") == shown  # what finestsam wrote is replaced


def test_an_overlay_that_was_painted_over_is_not_replaced(predict, folder):
    predict("images/scene_0.png")
    shutil.copy("images/scene_1.png", "out/scene_0.png")
    painted = (folder / "out/scene_0.png").read_bytes()

    assert predict("images/scene_0.png")[0] == 0

    assert (folder / "out/scene_0.png").read_bytes() == painted
    assert list_shown(folder / "out") == ["predictions.json", "scene_0.finestsam.png", "scene_0.png"]


@pytest.mark.parametrize("text", ["mine", None])
def test_results_of_somebody_are_reported_before_the_work_and_stay(predict, folder, text):
    predict("images/scene_0.png")
    path = folder / "out/predictions.json"
    path.write_text(path.read_text().replace('"score"', '"my_score"') if text is None else text)
    before = snapshot(folder / "out")

    code, _, err = predict("images/scene_1.png")

    assert code == 2
    assert err == (
        "finestsam: out/predictions.json is not replaced: finestsam did not write it, or it was changed since; move "
        "it away, or choose another --out_dir\n"
    )
    assert snapshot(folder / "out") == before


def test_a_second_process_does_not_write_into_the_same_folder(predict, folder):
    script = "from finestsam.runtime.folders import claim_output_folder\nfrom pathlib import Path\n"
    script += "claim_output_folder(Path('out'), None)\nprint('ready', flush=True)\ninput()"
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "ready\n"
        code, _, err = predict("images")
    finally:
        other.communicate("\n")

    assert code == 2
    assert err == "finestsam: another process writes into out_dir out; wait until it ends, or stop it\n"
    assert predict("images")[0] == 0


def test_what_another_process_wrote_into_the_same_journal_is_not_taken_up(predict, folder, weights, monkeypatch):
    """As on a disk without locks: two began, one line of each came, both were killed."""
    torch.manual_seed(1)
    torch.save({name: value + 0.01 for name, value in torch.load(weights).items()}, "other.pth")
    predict("images", out_dir="unbroken")
    journals = []
    for checkpoint in ("other.pth", weights):
        with monkeypatch.context() as patched:
            end_after(2, patched)
            assert predict("images", **{"model.checkpoint": checkpoint})[0] == 143
        journals.append((folder / "out/.predictions.jsonl").read_text().splitlines())
    (_, *theirs), (first, ours, *_) = journals
    (folder / "out/.predictions.jsonl").write_text("\n".join([first, ours, theirs[1], "[]", '{"image": 1}', "half"]))

    code, out, err = predict("images", resume="auto")

    assert (code, err) == (0, "")
    assert "1 of 3 images are done already" in out
    for name in list_shown(folder / "unbroken"):
        assert (folder / "unbroken" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_folders_and_patterns_are_expanded_in_order_without_repeats(folder):
    (folder / "images/notes.txt").write_text("")
    (folder / "images/.hidden.png").write_bytes(b"")
    (folder / "images/sub").mkdir()
    shutil.copy("images/scene_0.png", "images/sub/DEEP.PNG")
    shutil.copy("images/scene_0.png", "scene[1].png")

    def list_names(*inputs):
        return [path.as_posix() for path in find_images(list(inputs))]

    assert list_names("images") == [f"images/scene_{index}.png" for index in range(3)]
    assert list_names("images/*_[02]*", "images/scene_0.png") == ["images/scene_0.png", "images/scene_2.png"]
    assert list_names("images/**/*")[-1] == "images/sub/DEEP.PNG"
    assert list_names("scene[1].png") == ["scene[1].png"]  # a file of that name comes before the pattern
    with pytest.raises(UserError, match="no such file or folder"):
        find_images(["x" * 5000])


def test_overlays_of_an_earlier_run_are_no_images_of_a_pattern_that_reaches_them(folder, capsys):
    shutil.copytree("images", "out/sub")

    def list_parents(pattern, out_dir):
        return {path.parent.as_posix() for path in find_images([pattern], Path(out_dir))}

    assert list_parents("**/*", "out") == {"images"}
    assert "out: 3 images left out: there the results go" in capsys.readouterr().out
    assert list_parents("out/**/*", "out") == list_parents("out/s*/**/*", "out") == {"out/sub"}
    assert list_parents("*/*/*", "out") == {"out/sub"}
    assert list_parents("**/*", "elsewhere") == {"images", "out/sub"}
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="no image matches"):
        find_images(["**/sub/*"], Path("out"))


def test_overlays_have_different_safe_names_that_are_no_input_s(tmp_path):
    stems = ["a.png", "sub/a.jpg", "sub/A.bmp", "sub/a_2.png", "sub/..png", 'sub/q"?\n\x1b[1m.png', f"{'é' * 200}.png"]
    (tmp_path / "sub").mkdir()
    paths = [tmp_path / stem for stem in stems]

    names = [path.name for path in name_overlays(paths, tmp_path / "sub/..")]

    assert names[:4] == ["a.finestsam.png", "a_2.finestsam.png", "A_3.finestsam.png", "a_2_2.finestsam.png"]
    assert names[4:6] == ["image.finestsam.png", "q____[1m.finestsam.png"]
    assert len(names[6].encode()) < 255 and len({name.casefold() for name in names}) == len(names)
    (tmp_path / "other").mkdir()
    assert [path.name for path in name_overlays(paths[:2], tmp_path / "other")] == ["a.png", "a_2.png"]
    ours_as_input = [tmp_path / "a.png", tmp_path / "a.finestsam.png"]
    assert name_overlays(ours_as_input, tmp_path)[0].name == "a_2.finestsam.png"


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such names")
def test_names_with_line_breaks_and_bytes_that_are_no_text_are_predicted(predict, folder):
    name = os.fsdecode(b"line\nbreak\xff.png")
    shutil.copy("images/scene_0.png", name)

    code, out, _ = predict(name, **{"generator.pred_iou_thresh": 0.99})

    assert code == 0
    assert "line\\nbreak\\udcff.png: no masks" in out
    assert load(folder / "out/predictions.json")["images"][0]["file_name"] == name


def test_an_image_that_does_not_fit_into_the_memory_is_named_with_what_needs_less(predict, folder, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("finestsam.prediction.predict_masks.generate_masks", fail)
    code, _, err = predict("images/scene_0.png", **{"generator.points_per_batch": 64})

    assert code == 2
    assert "scene_0.png: out of memory; try --generator.points_per_batch below 64" in err
    assert "Traceback" not in err


def test_masks_of_the_json_are_those_of_the_overlay(predict, folder):
    predict("images/scene_0.png", opacity=1)

    content = load(folder / "out/predictions.json")
    masks = [decode_rle(rle_from_json(a["segmentation"])) for a in content["annotations"]]
    image, overlay = (read_image(folder / place / "scene_0.png") for place in ("images", "out"))
    outside = ~np.any(masks, axis=0)
    assert (image != overlay).any(axis=2)[~outside].all()
    # Outlines reach a little over the edge.
    assert (image == overlay)[distance_inside(outside) > 2].all()


def test_scores_are_corrected_on_demand_by_the_map_beside_the_weights(predict, folder, weights):
    code, _, err = predict("images/scene_0.png", correct_scores="true")
    assert code == 2 and "no map is stored beside these weights" in err
    shutil.copy(weights, "best.pth")
    card = Card("vit_tiny_test", 64, True, ["cell"], generator={"score_map": [[-5.0, 0.1], [5.0, 0.9]]})
    write_card(folder / "best.pth", card)

    predict("images/scene_0.png", **{"model.checkpoint": "best.pth", "correct_scores": "true"})

    annotations = load(folder / "out/predictions.json")["annotations"]
    assert annotations
    for annotation in annotations:
        assert annotation["score"] == pytest.approx(0.5 + 0.08 * annotation["predicted_iou"], abs=1e-5)


def test_a_broken_image_fails_a_strict_prediction_after_the_others_are_done(predict, folder):
    (folder / "images/scene_1.png").write_bytes(b"")

    code, out, _ = predict("images", strict="true")

    assert code == 2
    assert " in 2 images" in out
    assert [image["file_name"] for image in load(folder / "out/predictions.json")["images"]] == [
        "scene_0.png",
        "scene_2.png",
    ]


def test_a_prediction_that_was_interrupted_goes_on_where_it_stopped(predict, folder, monkeypatch):
    predict("images", out_dir="unbroken")
    calls = []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate_masks(*arguments)

    monkeypatch.setattr("finestsam.prediction.predict_masks.generate_masks", interrupt)
    code, out, err = predict("images")
    assert (code, err) == (143, "finestsam: interrupted\n")
    assert list_shown(folder / "out") == ["scene_0.png", "scene_1.png"]
    (folder / "out/.predictions.jsonl").open("a").write('{"image": {"file_na')  # as a kill leaves it
    calls.clear()

    code, out, _ = predict("images", resume="auto")

    assert (code, len(calls)) == (0, 1)
    assert "2 of 3 images are done already" in out
    assert list_shown(folder / "out") == list_shown(folder / "unbroken")
    for name in list_shown(folder / "unbroken"):
        assert (folder / "unbroken" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_a_finished_prediction_is_resumed_for_what_changed_alone(predict, folder, monkeypatch):
    whole = (folder / "images/scene_1.png").read_bytes()
    (folder / "images/scene_1.png").write_bytes(whole[:100])
    predict("images")
    wanted = []
    monkeypatch.setattr(
        "finestsam.prediction.predict_masks.generate_masks",
        lambda model, image, *others: (wanted.append(image.shape), generate_masks(model, image, *others))[1],
    )
    (folder / "images/scene_1.png").write_bytes(whole)
    write_image(folder / "images/scene_2.png", render_scene(9, 9, (50, 40)).image)

    code, _, _ = predict("images", resume="auto")

    assert (code, wanted) == (0, [(80, 60, 3), (50, 40, 3)])
    content = load(folder / "out/predictions.json")
    assert [image["id"] for image in content["images"]] == [1, 2, 3]
    assert {annotation["image_id"] for annotation in content["annotations"]} == {1, 2, 3}
    assert predict("images", resume="auto")[0] == 0
    assert len(wanted) == 2


def test_other_settings_are_not_mixed_with_what_is_done(predict, folder):
    predict("images")

    code, _, err = predict("images", resume="auto", **{"generator.pred_iou_thresh": 0.1})

    assert code == 2
    assert err == "finestsam: --resume: out/predictions.json was predicted with other weights or settings\n"
    (folder / "out/predictions.json").write_text("[]")
    assert "is not as finestsam wrote it" in predict("images", resume="auto")[2]
    assert "--resume takes no value, got sav/x" in predict("images", resume="sav/x")[2]


def end_after(count, monkeypatch):
    """Let the process be ended before the image of this number, counted from 0, and return what was requested."""
    wanted = []

    def find(model, image, *others):
        wanted.append(image.shape[:2])
        if len(wanted) == count + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate_masks(model, image, *others)

    monkeypatch.setattr("finestsam.prediction.predict_masks.generate_masks", find)
    return wanted


def test_an_interrupted_prediction_goes_on_over_a_finished_one_of_other_settings(predict, folder, monkeypatch):
    other = {"generator.points_per_side": 3}
    predict("images", **other, out_dir="unbroken")
    predict("images")
    wanted = end_after(1, monkeypatch)
    assert predict("images", **other)[0] == 143
    assert load(folder / "out/predictions.json")["info"]["generator"]["points_per_side"] == 4

    code, out, err = predict("images", **other, resume="auto")

    assert (code, err) == (0, "")
    assert "1 of 3 images are done already" in out and len(wanted) == 2 + 2
    for name in list_shown(folder / "unbroken"):
        assert (folder / "unbroken" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_overlays_that_another_prediction_has_overwritten_are_drawn_again(predict, folder, monkeypatch):
    predict("images")
    whole = (folder / "out/scene_0.png").read_bytes()
    end_after(1, monkeypatch)
    predict("images", opacity=1, **{"generator.points_per_side": 3})
    end_after(0, monkeypatch)
    predict("images")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert (folder / "out/scene_0.png").read_bytes() != whole

    predict("images", resume="auto")

    assert (folder / "out/scene_0.png").read_bytes() == whole


def test_overlays_follow_the_order_of_the_images_and_the_opacity(predict, folder):
    (folder / "more").mkdir()
    write_image(folder / "more/scene_0.png", render_scene(5, 5, (50, 40)).image)
    first, second = "images/scene_0.png", "more/scene_0.png"
    predict(second, first, out_dir="turned", opacity=0.5)
    predict(first, second)

    code, out, _ = predict(second, first, resume="auto")
    assert code == 0 and "done already" not in out
    assert read_image(folder / "out/scene_0.png").shape == (50, 40, 3)
    _, out, _ = predict(second, first, resume="auto", opacity=0.5)
    assert "done already" not in out
    _, out, _ = predict(second, first, resume="auto", opacity=0.5)
    assert "2 of 2 images are done already" in out

    for name in list_shown(folder / "turned"):
        assert (folder / "turned" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_deep_images_are_encoded_and_predicted_anew_in_another_range(predict, folder):
    values = render_scene(0, 0, (64, 96)).image[..., 0].astype(np.uint16) * 20
    Image.fromarray(values).save("deep.png")
    full = {"dataset.images.deep_range": "full", "precision": "32-true"}
    predict("deep.png", **full, **{"store.max_gigabytes": "0"}, out_dir="expected")
    predict("deep.png", precision="32-true")

    code, _, err = predict("deep.png", **full, resume="auto")
    assert (code, "was predicted with other weights or settings" in err) == (2, True)
    predict("deep.png", **full)

    # Those of the store are rounded: less than the next brightness of an image would change.
    scores, expected = (
        [a["predicted_iou"] for a in load(folder / name / "predictions.json")["annotations"]]
        for name in ("out", "expected")
    )
    assert len(scores) == len(expected) > 0
    np.testing.assert_allclose(scores, expected, atol=2e-3)


def test_a_cache_folder_that_is_a_file_costs_a_line(predict, folder, monkeypatch):
    monkeypatch.delenv("FINESTSAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "images/scene_0.png"))

    code, out, err = predict("images")

    assert code == 0 and " in 3 images" in out
    assert err.count("\n") == 1 and "embeddings are not kept" in err and "Not a directory" in err


def test_a_pattern_looks_into_each_folder_once_also_through_links_to_itself(folder):
    (folder / "images" / "self").symlink_to(".")
    (folder / "images" / "back").symlink_to(folder)
    (folder / "images" / "deep").mkdir()
    (folder / "elsewhere").mkdir()
    for place in ("images/deep", "elsewhere", "images/.hidden"):
        (folder / place).mkdir(exist_ok=True)
        shutil.copy(folder / "images" / "scene_0.png", folder / place / "copy.png")
    (folder / "images" / "out").symlink_to(folder / "elsewhere")
    scenes = {f"images/scene_{number}.png" for number in range(3)}

    def find(pattern: str) -> set[str]:
        return {path.as_posix() for path in find_images([pattern])}

    assert find("images/**/*.png") == scenes | {"images/deep/copy.png", "images/out/copy.png"}
    assert find("images/**") == scenes | {"images/deep/copy.png", "images/out/copy.png"}
    assert find("**/scene_1.png") == {"images/scene_1.png"}
    assert find("**/deep/**/*.png") == {"images/deep/copy.png"}
    assert find("im*/**/scene_[12].png") == {"images/scene_1.png", "images/scene_2.png"}


def test_links_and_pipes_among_readable_images_are_named_and_the_rest_is_done(predict, folder):
    os.symlink("x" * 300, folder / "images" / "long.png")  # no file can have this name
    os.symlink("nowhere.png", folder / "images" / "broken.png")
    os.symlink("circle.png", folder / "images" / "circle.png")
    os.mkfifo(folder / "images" / "pipe.png")

    code, out, err = predict("images", out_dir="out")

    assert code == 0
    assert "in 3 images" in out
    for name in ("long", "broken", "circle", "pipe"):
        assert f"finestsam: skipped images/{name}.png" in err
    assert predict("images", out_dir="strict", strict="true")[0] == 2
