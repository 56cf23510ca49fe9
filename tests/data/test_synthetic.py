import json
from functools import partial

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scene_laws import check_masks, check_seed_and_index_decide, check_sizes_differ

from finestsam.data.synthetic import FACADES, SHAPES, render_scene, write_scenes
from finestsam.images.files import read_image
from finestsam.runtime.processes import ITEMS_WORTH_A_PROCESS

EVERY_KIND = pytest.mark.parametrize("kind", [SHAPES, FACADES], ids=["shapes", "facades"])


@EVERY_KIND
def test_a_scene_is_a_function_of_its_seed_and_index(kind):
    check_seed_and_index_decide(partial(render_scene, kind=kind))


@EVERY_KIND
@pytest.mark.parametrize("size", [(64, 64), (256, 256), (180, 260)])
def test_masks_are_bool_large_enough_to_see_and_disjoint_within_their_level(kind, size):
    check_masks(partial(render_scene, kind=kind), size, most_levels=1)


@EVERY_KIND
def test_every_kind_draws_objects_of_many_sizes(kind):
    check_sizes_differ(partial(render_scene, kind=kind))


def test_without_a_kind_a_scene_shows_shapes():
    np.testing.assert_array_equal(render_scene(0, 3).image, render_scene(0, 3, kind=SHAPES).image)


@EVERY_KIND
def test_objects_differ_from_what_surrounds_them(kind):
    """A mask that is shifted against the image would have its edges where the image is smooth."""
    on_edges, elsewhere = [], []
    for index in range(8):
        scene = render_scene(2, index, kind=kind)
        labels = sum(number * mask for number, mask in enumerate(scene.masks, start=1))
        steps = np.abs(np.diff(scene.image.astype(float), axis=1)).mean(axis=2)
        is_edge = np.diff(labels, axis=1) != 0
        on_edges.append(steps[is_edge].mean())
        elsewhere.append(steps[~is_edge].mean())

    assert np.mean(on_edges) > 1.5 * np.mean(elsewhere)


def test_written_scenes_read_back_as_they_were_drawn(tmp_path):
    root = write_scenes(tmp_path, count=4, seed=5, size=(96, 96))

    coco = COCO(root / "data" / "annotations.json")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["shape", "window"]
    sizes = set()
    for index, image in enumerate(coco.loadImgs(coco.getImgIds())):
        size, kind = (image["height"], image["width"]), (SHAPES, FACADES)[index % 2]
        scene = render_scene(5, index, size, kind)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        np.testing.assert_array_equal(read_image(root / "data" / "images" / image["file_name"]), scene.image)
        np.testing.assert_array_equal([coco.annToMask(annotation) for annotation in annotations], scene.masks)
        assert {coco.cats[annotation["category_id"]]["name"] for annotation in annotations} == {kind.category}
        sizes.add(size)
    assert sizes == {(96, 96), (84, 108), (108, 84)}


def test_kinds_are_drawn_in_turn(tmp_path):
    root = write_scenes(tmp_path, count=4, size=(96, 96), kinds=[FACADES, SHAPES, FACADES])

    coco = COCO(root / "data" / "annotations.json")
    names = [
        {coco.cats[annotation["category_id"]]["name"] for annotation in coco.imgToAnns[image]}
        for image in sorted(coco.imgs)
    ]
    assert names == [{"window"}, {"shape"}, {"window"}, {"window"}]


def test_areas_and_boxes_are_those_of_pycocotools(tmp_path):
    write_scenes(tmp_path, count=3, size=(96, 96))

    annotations = json.loads((tmp_path / "data" / "annotations.json").read_text())["annotations"]
    assert [annotation["id"] for annotation in annotations] == list(range(1, len(annotations) + 1))
    for annotation in annotations:
        assert annotation["area"] == coco_mask.area(annotation["segmentation"])
        assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
        assert annotation["iscrowd"] == 0


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    first, again, other = (
        {path.name: path.read_bytes() for path in write_scenes(tmp_path / name, 3, seed, (64, 64)).rglob("*.*")}
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )

    assert sorted(first) == ["annotations.json", "scene_0000.png", "scene_0001.png", "scene_0002.png"]
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_writing_in_several_processes_changes_nothing(tmp_path):
    count = 2 * ITEMS_WORTH_A_PROCESS  # the fewest that two processes share

    write_scenes(tmp_path, count, seed=3, size=(32, 32))

    path = tmp_path / "data" / "images" / f"scene_{count - 1:04d}.png"
    image = read_image(path)
    np.testing.assert_array_equal(image, render_scene(3, count - 1, image.shape[:2], FACADES).image)
