import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from finestsam.tasks.masks import MasksTask
from finestsam.training.plots import COLORS, LEGEND_WIDTH, VALIDATION, plot_curves

MEASURES = MasksTask.measures
CURVES = [*MEASURES, "learning_rate"]
NAMES = [*CURVES, "all_metrics"]
BASELINE = {"epoch": 0, "step": 0, "val_per_mask_iou": 0.4}


def make_rows(epochs: int) -> list[dict[str, float | None]]:
    rows = [dict(BASELINE)]
    for epoch in range(1, epochs + 1):
        values = {name: 0.1 + place / 20 + 1 / epoch for place, name in enumerate(CURVES)}
        rows.append(values | {"epoch": epoch, "step": 5 * epoch, "val_per_mask_iou": 0.9 - 1 / (epoch + 1)})
    return rows


def draw(rows: list, folder: Path) -> dict[str, np.ndarray]:
    """Draw and return {name: image, H x W x 3, RGB}."""
    return {path.stem: cv2.imread(str(path))[..., ::-1] for path in plot_curves(rows, MEASURES, folder)}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, np.ndarray]:
    return draw(make_rows(5), tmp_path_factory.mktemp("run"))


def count_pixels(image: np.ndarray, color: str) -> int:
    rgb = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    return int((np.abs(image.astype(int) - rgb).max(axis=-1) < 20).sum())


def test_every_curve_has_an_image_and_there_is_one_of_all(tmp_path):
    paths = plot_curves(make_rows(5), MEASURES, tmp_path)
    assert paths == [tmp_path / "plots" / f"{name}.png" for name in NAMES]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(path.name for path in paths)


def test_a_curve_is_drawn_in_its_own_color_in_both_images(images):
    for name in ("focal_loss", "dice_loss", "iou_loss", "iou", "predicted_iou"):
        assert count_pixels(images[name], COLORS[name]) > 200
        assert count_pixels(images["all_metrics"], COLORS[name]) > 200


def test_validation_is_drawn_beside_the_iou_and_among_all_curves(images):
    drawn = {name for name, image in images.items() if count_pixels(image, VALIDATION["val_per_mask_iou"][1]) > 200}
    assert drawn == {"iou", "all_metrics"}


def test_all_curves_are_three_panels_and_legends_stand_beside_them(images):
    """Losses above, validation beside its baseline in the middle, the rate below; the right quarter is for legends."""
    image = images["all_metrics"]
    panels = np.array_split(image, 3)
    axes_end = int(image.shape[1] * (1 - LEGEND_WIDTH / (6.2 + LEGEND_WIDTH)))
    for name, place in {"focal_loss": 0, "iou": 1, "learning_rate": 2}.items():
        counts = [count_pixels(panel[:, :axes_end], COLORS[name]) for panel in panels]
        assert np.argmax(counts) == place and counts[place] > 200
    validation = VALIDATION["val_per_mask_iou"][1]
    assert count_pixels(panels[1][:, :axes_end], validation) > 200 and count_pixels(panels[0], validation) == 0
    for name, panel in {"focal_loss": panels[0], "iou": panels[1]}.items():
        assert count_pixels(panel[:, axes_end + 10 :], COLORS[name]) > 20  # its line in the legend


def test_a_legend_hides_no_curve(tmp_path):
    rows = [row | {"iou": 0.95, "val_per_mask_iou": 0.95} for row in make_rows(8)[1:]]  # where a legend would be put

    image = draw(rows, tmp_path)["iou"]

    columns = (np.abs(image.astype(int) - [0x00, 0x9E, 0x73]).max(axis=-1) < 20).any(axis=0)
    validation = (np.abs(image.astype(int) - [0xE6, 0x9F, 0x00]).max(axis=-1) < 20).any(axis=0)
    assert np.ptp((columns | validation)[: int(0.7 * image.shape[1])].nonzero()[0]) > 0.5 * image.shape[1]


def test_the_baseline_is_a_line_through_the_whole_panel(images, tmp_path):
    without = draw(make_rows(5)[1:], tmp_path)["iou"]
    rgb = [int(VALIDATION["val_per_mask_iou"][1][place : place + 2], 16) for place in (1, 3, 5)]

    def count_columns(image: np.ndarray) -> int:
        rows = (np.abs(image.astype(int) - rgb).max(axis=-1) < 60).sum(axis=1)
        return int(rows.max())

    assert count_columns(images["iou"]) > 200 > 60 > count_columns(without)


@pytest.mark.parametrize("baseline", [[BASELINE], []], ids=["beside a baseline", "alone"])
def test_the_total_loss_is_drawn_whole_where_nothing_else_was_measured(tmp_path, baseline):
    rows = [*baseline, *({"epoch": epoch, "step": epoch, "total_loss": 1 / epoch} for epoch in range(1, 9))]
    image = draw(rows, tmp_path)["all_metrics"]
    height, width = image.shape[:2]
    within = image[int(0.05 * height) : int(0.27 * height), int(0.12 * width) : int(0.7 * width)]  # no axes, no words
    assert np.ptp((within < 60).all(axis=-1).any(axis=0).nonzero()[0]) > 0.4 * width


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [BASELINE],
        [{"epoch": 1, "step": 2, "total_loss": 0.5}],
        make_rows(1),
        [BASELINE, {"epoch": 1, "step": 2, "total_loss": 0.5, "iou": None, "learning_rate": 0.0}],
        [row | ({"val_per_mask_iou": None} if row["epoch"] % 3 else {"iou_loss": None}) for row in make_rows(4)],
    ],
    ids=["no row", "the baseline", "one value", "one epoch", "no rate", "gaps"],
)
def test_what_was_not_measured_is_left_out(tmp_path, rows):
    images = draw(rows, tmp_path)
    assert list(images) == NAMES
    assert all((image < 100).all(axis=-1).any() for image in images.values())


def test_many_epochs_are_drawn_as_a_line_without_points(tmp_path):
    rows = [row | {"iou": 0.5} for row in make_rows(31)[1:]]
    few, many = (draw(part, tmp_path)["iou"] for part in (rows[:30], rows))
    assert count_pixels(few, COLORS["iou"]) > 1.2 * count_pixels(many, COLORS["iou"])


def test_drawing_leaves_pyplot_and_the_settings_of_a_notebook_alone(tmp_path):
    script = (
        "import sys, matplotlib; from pathlib import Path; before = [*dict.items(matplotlib.rcParams)];"
        "from finestsam.training.plots import plot_curves; plot_curves([], {}, Path(sys.argv[1]));"
        "assert 'matplotlib.pyplot' not in sys.modules; assert [*dict.items(matplotlib.rcParams)] == before"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_place_that_cannot_be_written_is_an_os_error_for_the_caller(tmp_path):
    (tmp_path / "plots").touch()
    with pytest.raises(OSError, match="exists"):
        plot_curves(make_rows(1), MEASURES, tmp_path)
