"""COCO in miniature, fetched over real connections from a server on this machine."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from file_server import Site

import finestsam
from finestsam.cli import main
from finestsam.config import DatasetConfig
from finestsam.data.read import read_training_set
from finestsam.errors import UserError
from finestsam.modes import download as coco_download
from finestsam.modes.download import COCO_PARTS, PARTS, Archive, CocoPart, fetch_coco
from finestsam.runtime import download as download_module

IDS = [9, 2, 7, 4, 5, 8, 1, 6, 3, 10]  # COCO's own are not in order either
UNLABELLED, CROWD = 1, 3
FIRST_FOUR = {2, 4, 5, 6}  # with objects that are no crowd
ANNOTATIONS_URL, IMAGES_URL = "/annotations/annotations_trainval2017.zip", "/zips/val2017.zip"
ANNOTATION_FILE = "annotations/instances_val2017.json"


def name_of(image_id):
    return f"{image_id:012}.jpg"


def make_image(image_id):
    pixels = np.random.default_rng(image_id).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def make_annotations():
    square = [[10, 10, 40, 10, 40, 40, 10, 40]]
    crowd = {"size": [48, 64], "counts": [100, 500, 48 * 64 - 600]}
    objects = [
        {"id": 100 + image_id, "image_id": image_id, "category_id": 1, "bbox": [10, 10, 30, 30], "area": 900,
         "iscrowd": int(image_id == CROWD), "segmentation": crowd if image_id == CROWD else square}
        for image_id in IDS if image_id != UNLABELLED
    ]  # fmt: skip
    images = [{"license": 1, "file_name": name_of(id), "height": 48, "width": 64, "id": id} for id in IDS]
    content = {"info": {"year": 2017}, "images": images, "annotations": objects}
    return json.dumps(content | {"categories": [{"id": 1, "name": "thing"}]}).encode()


def make_zip(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


IMAGES = {name_of(image_id): make_image(image_id) for image_id in IDS}
ANNOTATIONS = make_annotations()
ANNOTATIONS_ZIP = make_zip(
    {ANNOTATION_FILE: ANNOTATIONS, "annotations/instances_train2017.json": b"{}", "annotations/captions.json": b"{}"}
)
IMAGES_ZIP = make_zip({"val2017/": b""} | {f"val2017/{name}": content for name, content in IMAGES.items()})


def describe(path, content):
    return Archive(path, hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download_module, "PAUSES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(coco_download, "ANNOTATIONS", describe(ANNOTATIONS_URL[1:], ANNOTATIONS_ZIP))
    part = CocoPart("val2017", len(IDS), describe(IMAGES_URL[1:], IMAGES_ZIP))
    monkeypatch.setitem(PARTS, "coco-val2017", part)
    with Site() as site:
        monkeypatch.setenv("FINESTSAM_COCO_URL", f"{site.address}/")
        site.files = {ANNOTATIONS_URL: ANNOTATIONS_ZIP, IMAGES_URL: IMAGES_ZIP}
        site.files |= {f"/val2017/{name}": content for name, content in IMAGES.items()}
        yield site


@pytest.fixture
def root(tmp_path):
    return tmp_path / "coco"


def fetch(root, image_count=None):
    fetch_coco("coco-val2017", root, image_count)


def start_process(root):
    """Fetch in another process, which knows the archives of this test by what they are written as."""
    code = "import sys; from pathlib import Path; from finestsam.modes import download as coco_download\n"
    code += "from finestsam.modes.download import *\n"
    code += f"coco_download.ANNOTATIONS = {coco_download.ANNOTATIONS}\n"
    code += f"PARTS['coco-val2017'] = {PARTS['coco-val2017']}\n"
    code += "fetch_coco('coco-val2017', Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(Path(finestsam.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", code, root], env=environment, stderr=subprocess.DEVNULL)


def list_ids(root):
    return {image["id"] for image in json.loads((root / ANNOTATION_FILE).read_bytes())["images"]}


def list_tree(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"}


def assert_whole(root):
    assert (root / ANNOTATION_FILE).read_bytes() == ANNOTATIONS
    assert {path.name: path.read_bytes() for path in (root / "val2017").iterdir()} == IMAGES
    assert not (root / ".coco-val2017").exists()


def assert_subset(root, ids):
    assert list_ids(root) == ids
    for image_id in ids:
        assert (root / "val2017" / name_of(image_id)).read_bytes() == IMAGES[name_of(image_id)]


def assert_nothing_to_be_taken_for_complete(root):
    assert not (root / ANNOTATION_FILE).exists()


def wait_for(is_true):
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# Whole


def test_a_part_arrives_in_cocos_own_layout_and_the_archives_are_removed(site, root):
    fetch(root)

    assert_whole(root)
    assert list_tree(root) == {ANNOTATION_FILE, *(f"val2017/{name}" for name in IMAGES)}
    assert site.paths == [ANNOTATIONS_URL, IMAGES_URL]


def test_what_is_fetched_can_be_trained_on(site, root):
    fetch(root)

    data = read_training_set(DatasetConfig(path=str(root), use_cache=False))

    assert {record.image_id for record in data.train + data.val} == set(IDS)
    assert data.layout == "COCO annotations: instances_val2017.json"


def test_the_real_command_fetches_and_checks(site, root, capsys):
    flags = ["--mode=check", f"--dataset={root}", "--download=coco-val2017", "--dataset.download_images=4"]
    flags += [f"--out_dir={root.parent / 'out'}", "--check.samples=0"]

    assert main(flags) == 0
    assert "fetching 4 images of coco-val2017 into" in capsys.readouterr().err
    assert_subset(root, FIRST_FOUR)


def test_a_complete_part_is_recognised_without_the_network(site, root, monkeypatch):
    fetch(root)
    site.paths.clear()
    monkeypatch.setenv("FINESTSAM_COCO_URL", "http://127.0.0.1:9")

    fetch(root)

    assert site.paths == []
    assert_whole(root)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["missing", "empty"])
def test_an_image_that_is_gone_is_fetched_again(site, root, harm):
    fetch(root)
    harm(root / "val2017" / name_of(7))

    fetch(root)

    assert_whole(root)


def test_other_files_are_left_as_they_are(site, root):
    mine = {"readme.txt": b"mine", "annotations/instances_mine.json": b"{}", f"val2017/{name_of(4)}": b"changed by me"}
    for name, content in mine.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    fetch(root)

    assert {name: (root / name).read_bytes() for name in mine} == mine
    assert (root / "val2017" / name_of(5)).read_bytes() == IMAGES[name_of(5)]


# Interrupted


@pytest.mark.parametrize("archive, before", [(ANNOTATIONS_ZIP, []), (IMAGES_ZIP, [1 << 30])])
def test_a_lost_connection_is_continued_by_the_next_run(site, root, archive, before):
    site.cuts = [*before, len(archive) // 2, 0, 0]
    with pytest.raises(UserError, match=r"the connection ended after [\d,]+ of [\d,]+ bytes, try again to continue"):
        fetch(root)
    assert_nothing_to_be_taken_for_complete(root)
    site.requests.clear()

    fetch(root)

    assert site.requests[0]["Range"] == f"bytes={len(archive) // 2}-"
    assert_whole(root)


def test_a_server_without_ranges_is_requested_the_whole_again(site, root):
    site.cuts, site.has_ranges = [1 << 30, len(IMAGES_ZIP) // 2], False

    fetch(root)

    assert site.paths == [ANNOTATIONS_URL, IMAGES_URL, IMAGES_URL]
    assert_whole(root)


def test_a_killed_process_is_continued(site, root):
    site.cuts, site.hangs = [1 << 30, len(IMAGES_ZIP) // 2], True
    process = start_process(root)
    part = root / ".coco-val2017" / ".val2017.zip.part"
    wait_for(lambda: part.exists() and part.stat().st_size == len(IMAGES_ZIP) // 2)
    process.kill()
    process.communicate()
    assert_nothing_to_be_taken_for_complete(root)

    fetch(root)

    assert site.requests[-1]["Range"] == f"bytes={len(IMAGES_ZIP) // 2}-"
    assert_whole(root)


@pytest.mark.parametrize("step", ["replace", "write_bytes"])
@pytest.mark.parametrize("image_count", [None, 4])
def test_an_interruption_after_the_download_is_continued(site, root, monkeypatch, step, image_count):
    calls = []

    def interrupt_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3 or step == "write_bytes":
            raise KeyboardInterrupt
        rename(*arguments)

    rename = os.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os if step == "replace" else coco_download, step, interrupt_third)
        fetch(root, image_count)
    assert_nothing_to_be_taken_for_complete(root)

    fetch(root, image_count)

    if image_count:
        assert_subset(root, FIRST_FOUR)
    else:
        assert_whole(root)


def test_two_processes_fetch_once(site, root):
    site.pause_seconds = 0.3
    processes = [start_process(root) for _ in range(2)]

    assert [process.wait(timeout=300) for process in processes] == [0, 0]

    assert sorted(site.paths) == [ANNOTATIONS_URL, IMAGES_URL]
    assert_whole(root)


# Wrong


@pytest.mark.parametrize("url", [ANNOTATIONS_URL, IMAGES_URL])
def test_wrong_bytes_are_reported_with_both_hashes_and_removed(site, root, url):
    right = site.files[url]
    wrong = site.files[url] = bytes([right[0] ^ 1]) + right[1:]
    hashes = [hashlib.sha256(content).hexdigest() for content in (wrong, right)]

    with pytest.raises(UserError, match=f"its sha256 is {hashes[0]}, expected {hashes[1]}; the download was removed"):
        fetch(root)
    assert_nothing_to_be_taken_for_complete(root)
    assert not [*root.rglob("*.zip"), *root.rglob("*.part")]

    site.files[url] = right
    fetch(root)
    assert_whole(root)


def test_offline_shows_the_address_the_place_and_the_hash(site, root, monkeypatch):
    monkeypatch.setenv("FINESTSAM_COCO_URL", "http://127.0.0.1:9")

    with pytest.raises(UserError) as caught:
        fetch(root)

    place = root / ".coco-val2017" / "annotations.zip"
    by_hand = f"to fetch it by hand, save it as {place} (sha256 {coco_download.ANNOTATIONS.sha256})"
    assert f"cannot download http://127.0.0.1:9{ANNOTATIONS_URL}: " in str(caught.value)
    assert by_hand in str(caught.value) and "\n" not in str(caught.value)


def test_archives_that_were_fetched_by_hand_are_used(site, root, monkeypatch):
    work = root / ".coco-val2017"
    work.mkdir(parents=True)
    (work / "annotations.zip").write_bytes(ANNOTATIONS_ZIP)
    (work / "val2017.zip").write_bytes(IMAGES_ZIP)

    fetch(root)

    assert site.paths == []
    assert_whole(root)


def test_an_archive_that_lacks_images_is_reported(site, root):
    work = root / ".coco-val2017"
    work.mkdir(parents=True)
    (work / "val2017.zip").write_bytes(make_zip({f"val2017/{name_of(9)}": IMAGES[name_of(9)]}))

    with pytest.raises(UserError, match="val2017/000000000002.jpg is missing; remove .*coco-val2017 and start again"):
        fetch(root)
    assert_nothing_to_be_taken_for_complete(root)


def test_only_https_is_requested(site, root):
    with pytest.raises(UserError, match="http://example.org/annotations/.*: only https addresses are downloaded"):
        fetch_coco("coco-val2017", root, base_url="http://example.org")


def test_a_folder_that_cannot_be_made_is_reported(site, root):
    root.write_text("a file")

    with pytest.raises(UserError, match="cannot fetch coco-val2017 into .*coco: "):
        fetch(root)


# The first images only


def test_a_number_of_images_is_fetched_one_by_one(site, root, capsys):
    fetch(root, 4)

    assert_subset(root, FIRST_FOUR)
    assert set(site.paths) == {ANNOTATIONS_URL, *(f"/val2017/{name_of(image_id)}" for image_id in FIRST_FOUR)}
    content, official = json.loads((root / ANNOTATION_FILE).read_bytes()), json.loads(ANNOTATIONS)
    assert {entry["image_id"] for entry in content["annotations"]} == FIRST_FOUR
    assert all(entry in official["annotations"] for entry in content["annotations"])
    assert content["categories"] == official["categories"]
    assert len(read_training_set(DatasetConfig(path=str(root), use_cache=False)).train) > 0


def test_a_larger_number_adds_what_is_missing(site, root):
    fetch(root, 4)
    site.paths.clear()

    fetch(root, 9)  # eight have objects; the crowd and the unlabelled one come last, by their ids

    assert_subset(root, set(IDS) - {CROWD})
    new = set(IDS) - FIRST_FOUR - {CROWD}
    assert sorted(site.paths) == [f"/val2017/{name_of(image_id)}" for image_id in sorted(new)]


def test_all_after_some(site, root):
    fetch(root, 4)

    fetch(root)

    assert_whole(root)


@pytest.mark.parametrize("image_count", [10, 1000])
def test_all_by_number_is_the_whole_part(site, root, image_count):
    fetch(root, image_count)

    assert_whole(root)
    assert site.paths == [ANNOTATIONS_URL, IMAGES_URL]


@pytest.mark.parametrize("first", [6, None])
def test_a_smaller_number_leaves_what_is_there_and_says_so(site, root, first, capsys):
    fetch(root, first)
    before = (root / ANNOTATION_FILE).read_bytes()
    site.paths.clear()

    fetch(root, 4)

    assert f"holds {first or 10} images of coco-val2017, more than 4: all are used" in capsys.readouterr().err
    assert (root / ANNOTATION_FILE).read_bytes() == before and site.paths == []


def test_some_images_that_arrived_are_not_fetched_again(site, root):
    lost = site.files.pop(f"/val2017/{name_of(6)}")
    with pytest.raises(UserError, match="cannot download http.*/val2017/000000000006.jpg: HTTP Error 404"):
        fetch(root, 4)
    assert_nothing_to_be_taken_for_complete(root)
    site.files[f"/val2017/{name_of(6)}"] = lost
    there = {path.name for path in (root / "val2017").iterdir()}
    site.paths.clear()

    fetch(root, 4)

    assert {path.rpartition("/")[2] for path in site.paths} == {name_of(image_id) for image_id in FIRST_FOUR} - there
    assert_subset(root, FIRST_FOUR)


# An annotation file that is there already


def test_an_annotation_file_of_somebody_else_is_not_overwritten(site, root):
    (root / "annotations").mkdir(parents=True)
    mine = b'{"images": [{"id": 2, "file_name": "000000000002.jpg"}], "annotations": []}'
    (root / ANNOTATION_FILE).write_bytes(mine)

    for image_count in (4, None):
        with pytest.raises(UserError, match="instances_val2017.json is not COCO's own and is not overwritten; move it"):
            fetch(root, image_count)
    assert (root / ANNOTATION_FILE).read_bytes() == mine


def test_cocos_own_annotations_without_images_are_completed_but_not_cut_down(site, root):
    (root / "annotations").mkdir(parents=True)
    (root / ANNOTATION_FILE).write_bytes(ANNOTATIONS)

    message = (
        "instances_val2017.json lists 10 images that are not all there, more than the 4 requested; request as many"
    )
    with pytest.raises(UserError, match=message):
        fetch(root, 4)
    fetch(root)

    assert_whole(root)


def test_the_published_figures_are_whole():
    archives = [coco_download.ANNOTATIONS, *(part.images for part in PARTS.values())]

    assert COCO_PARTS == ("coco-val2017", "coco-train2017")
    assert all(len(bytes.fromhex(archive.sha256)) == 32 and archive.size_bytes > 2e8 for archive in archives)


def test_importing_needs_no_torch():
    code = "import sys, finestsam.modes.download; sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd=Path(finestsam.__file__).parents[1]).returncode == 0


def test_a_full_disk_is_reported_before_the_archive_is_fetched(site, root, monkeypatch):
    monkeypatch.setattr(coco_download.shutil, "disk_usage", lambda _: SimpleNamespace(free=len(IMAGES_ZIP) + 5))

    with pytest.raises(UserError, match="are free.*--dataset.download_images"):
        fetch(root)

    assert IMAGES_URL not in site.paths
