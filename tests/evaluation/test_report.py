"""The page is whole, safe against names, and opens in a real browser where there is one."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from finestsam.config import build_config
from finestsam.evaluation.coco_scores import Detections
from finestsam.evaluation.measurement import Measurement, compare
from finestsam.evaluation.prompt_scorer import BackgroundScores
from finestsam.evaluation.prompt_scores import ObjectScore
from finestsam.evaluation.report import list_effective_settings, write_report_page
from finestsam.evaluation.result import Evaluation
from finestsam.evaluation.subject import Setup, Thresholds, find_sam_thresholds
from finestsam.evaluation.thresholds import Calibration

HOSTILE = "<img src=x onerror=alert(1)> & \u202ename"
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def make_measurement(records, shift: float) -> Measurement:
    scores = [
        ObjectScore(record.image_id, annotation.id, 0.5 + shift, 0.6, 0.7, 0.4, 0.5)
        for record in records
        for annotation in record.annotations
    ]
    found = [
        Detections(
            [record.rle(annotation) for annotation in record.annotations[::2]], [0.9] * len(record.annotations[::2])
        )
        for record in records
    ]
    calibration = Calibration(
        np.array([0.2, 0.8]), np.array([0.3, 0.6]), np.array([5, 5]), 0.15, [[0.2, 0.3], [0.8, 0.6]]
    )
    points = np.full(8, 0.3 + shift)
    background = [BackgroundScores(record.image_id, points, points > 0.35) for record in records]
    clicks = {1: 0.4, 8: 0.6 + shift}
    thresholds = Thresholds(find_sam_thresholds(build_config({})).settings, HOSTILE)
    setup = Setup(HOSTILE, "vit_tiny", 384, thresholds)
    return Measurement(
        records, found, {"point": scores, "box": scores}, clicks, background, calibration=calibration, setup=setup
    )


@pytest.fixture
def page(records, tmp_path):
    records = [replace(record, file_name=f"{HOSTILE}{place}.png") for place, record in enumerate(records)]
    ours, theirs = make_measurement(records, 0.1), make_measurement(records, 0.0)
    path = tmp_path / "report.html"
    learned = frozenset(record.file_name for record in records[:2])
    evaluation = Evaluation(
        HOSTILE, ours, HOSTILE, theirs, compare(ours, theirs), learned=learned, described_images=HOSTILE
    )
    write_report_page(path, evaluation, build_config({"dataset.path": HOSTILE}))
    return path


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.open, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in ("meta", "img", "input", "br", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "img", "input", "br", "path", "use"):
            assert self.open.pop() == tag


def test_names_are_text_and_never_html(page):
    text = page.read_text(encoding="utf-8")

    tags = Tags(text)
    assert tags.open == []
    assert not any(name.startswith("on") for name, _ in tags.attributes)
    assert "<img src=x" not in text and "\u202e" not in text


def test_the_page_needs_the_network_for_nothing(page):
    text = page.read_text(encoding="utf-8")

    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", text)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "@import" not in text and "url(http" not in text


def test_every_figure_stands_beside_its_difference(page):
    text = page.read_text(encoding="utf-8")

    assert "One point: IoU of the mask with the highest score" in text and "+0.100" in text
    assert "Worst images of the generator" in text and "Best images of the generator" in text
    assert "missed" in text and "<h3>baseline</h3>" in text and "compared with" not in text
    assert text.count("<div class='image'>") == 6  # every image once


def test_a_higher_score_where_no_object_is_is_worse(page):
    text = page.read_text(encoding="utf-8")

    row = re.search("<td>Background point: predicted IoU</td>(.*?)</tr>", text).group(1)
    assert "<span class='worse'>+0.100</span>" in row
    assert "<span class='better'>+0.100</span>" in text


def test_precision_is_drawn_for_both_models(page):
    text = page.read_text(encoding="utf-8")

    for label in ("this model, IoU 0.5", "this model, IoU 0.75", "baseline, IoU 0.5", "baseline, IoU 0.75"):
        assert f"<!-- {label} -->" in text


def test_a_report_of_one_model_alone_has_no_empty_columns(records, tmp_path):
    ours = make_measurement(records, 0.1)
    write_report_page(tmp_path / "r.html", Evaluation("best.pth", ours), build_config({}))

    text = (tmp_path / "r.html").read_text()
    assert "baseline" not in text.split("<h2>Curves")[0]
    assert "repeat(3, 1fr)" in text


def test_the_rows_of_objects_and_of_masks_add_up(page):
    text = page.read_text(encoding="utf-8")

    rows = re.findall(r"<tr(?: class='(total)')?><td(?: class='kind')?>([^<]*)</td><td>(\d+) <span", text)
    groups: dict[str, list[int]] = {}  # of each the total, then its kinds
    for is_total, title, count in rows:
        if is_total:
            groups[title] = []
        groups[next(reversed(groups))].append(int(count))
    assert set(groups) == {"objects", "masks"}
    for total, *kinds in groups.values():
        assert total == sum(kinds) > 0


def test_images_that_were_trained_on_are_named(page):
    text = page.read_text(encoding="utf-8")

    assert "2 of the 6 images were trained on" in text and text.count("; trained on") == 2


def test_settings_are_shown_as_they_took_effect(page, records):
    evaluation = Evaluation("best.pth", make_measurement(records, 0.1), described_images="6 images")

    settings = list_effective_settings(evaluation, build_config({}))

    assert None not in settings.values()
    assert settings["generator.pred_iou_thresh"] == "0.88" and settings["model.image_size"] == 384
    assert settings["model.type"] == "vit_tiny" and settings["evaluate.split"] == "auto: 6 images"
    assert "<td>None</td>" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("count", "is_known"), [(4, False), (5, True)])
def test_there_is_no_interval_below_five_images(records, tmp_path, count, is_known):
    ours, theirs = (make_measurement(records[:count], shift) for shift in (0.1, 0.0))
    evaluation = Evaluation("best.pth", ours, "start.pth", theirs, compare(ours, theirs))

    write_report_page(tmp_path / "r.html", evaluation, build_config({}))

    text = (tmp_path / "r.html").read_text()
    assert ("too few images for an interval" in text) != is_known
    assert bool(re.search(r"[+-]\d\.\d{3} to [+-]", text)) == is_known


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_masks_can_be_hidden_and_images_zoomed_in_a_browser(page, tmp_path):
    """The page with a script at its end that works it, and says in the document what came of it."""
    trial = tmp_path / "trial.html"
    script = """<script>
    const view = document.querySelector('.view'), layer = document.querySelectorAll('.view img + img')[0];
    const seen = [getComputedStyle(layer).visibility];
    document.getElementById('masks').click();
    seen.push(getComputedStyle(layer).visibility);
    view.dispatchEvent(new WheelEvent('wheel', { deltaY: -300, clientX: 50, clientY: 50, cancelable: true }));
    seen.push(view.querySelector('img').style.transform);
    seen.push([...document.images].every(image => image.complete && image.naturalWidth > 0));
    document.title = 'seen ' + seen.join(' ');
    </script></body>"""
    trial.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]

    found = subprocess.run(
        [*command, "--virtual-time-budget=3000", "--dump-dom", trial.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
    )

    title = re.search("<title>(.*?)</title>", found.stdout).group(1)
    assert title.startswith("seen visible hidden translate(") and title.endswith("true")
    assert float(re.search(r"scale\(([\d.]+)\)", title).group(1)) > 2
