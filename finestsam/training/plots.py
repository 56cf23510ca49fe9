"""Draw a run's curves from the rows of its metrics.csv.

Figures are made without pyplot, which would take over the settings of a notebook that calls this.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finestsam.evaluation.charts import count_epochs
from finestsam.whole_files import replacing

Rows = Sequence[Mapping[str, float | None]]

# Title and colour (Okabe and Ito's, told apart by the colour-blind too) of what is drawn against epochs.
TITLES = {
    "total_loss": "Total loss",
    "focal_loss": "Focal loss",
    "dice_loss": "Dice loss",
    "iou_loss": "IoU loss",
    "iou": "IoU",
    "predicted_iou": "Predicted IoU",
    "learning_rate": "Learning rate",
}
# In a run that learns a category for each mask as well.
CLASS_TITLES = TITLES | {"class_loss": "Class loss", "class_accuracy": "Class accuracy"}
# The same of a run that learns a class for each pixel.
SEMANTIC_TITLES = {
    "total_loss": "Total loss",
    "cross_entropy_loss": "Cross-entropy",
    "dice_loss": "Dice loss",
    "pixel_accuracy": "Pixel accuracy",
    "learning_rate": "Learning rate",
}
COLORS = {
    "cross_entropy_loss": "#D55E00",
    "pixel_accuracy": "#009E73",
    "class_loss": "#999933",
    "class_accuracy": "#332288",
    "total_loss": "black",
    "focal_loss": "#D55E00",
    "dice_loss": "#0072B2",
    "iou_loss": "#CC79A7",
    "iou": "#009E73",
    "predicted_iou": "#56B4E9",
    "learning_rate": "#666666",
}
# Measured in validation: how a line is called, and its colour.
VALIDATION = {
    "val_per_mask_iou": ("Validation IoU", "#E69F00"),
    "val_generator_ar_100": ("Generator AR", "#882255"),
    "val_classes_ar_100": ("Generator AR by category", "#44AA99"),
    "val_miou": ("Validation mIoU", "#E69F00"),
}
# Drawn with the curve of what they measure in training.
VALIDATED = ("iou", "pixel_accuracy")
MARKED_POINTS = 30  # lines of more points are drawn without a marker on each


def draw_curves(rows: Rows, folder: Path) -> list[Path]:
    """Write a PNG for every curve, and one of all together, to `folder/plots`, and return their paths.

    Args:
        rows: of a RunLog; epoch 0 is the untouched model, whose validation is the floor.
        folder: of the run.
    """
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    kinds = {"cross_entropy_loss": SEMANTIC_TITLES, "class_loss": CLASS_TITLES}
    titles = next((titles for name, titles in kinds.items() if any(name in row for row in rows)), TITLES)
    figures = {name: _draw_one(rows, name, title) for name, title in titles.items()}
    figures["all_metrics"] = _draw_all(rows, titles)
    paths = []
    for name, figure in figures.items():
        paths.append(plots / f"{name}.png")
        with replacing(paths[-1], is_lasting=False) as partial:
            figure.savefig(partial, format="png")
    return paths


def _draw_one(rows: Rows, name: str, title: str) -> Figure:
    figure, axes = _make_figure(width=7, right=0.96)
    _draw_line(axes, rows, name, "Training")
    if name in VALIDATED:
        _draw_validation(axes, rows)
    if name == "learning_rate":
        _scale_rate(axes, rows)
    _finish(axes, title, title)
    axes.spines["right"].set_visible(False)
    if len(axes.lines) > 1:
        axes.legend(edgecolor="none", framealpha=0.8)
    return figure


def _draw_all(rows: Rows, titles: Mapping[str, str]) -> Figure:
    """Losses and IoU share the left axis; the total loss, which is far larger, has the right one."""
    figure, left = _make_figure(width=10, right=0.72)
    for name, title in titles.items():
        if name not in ("total_loss", "learning_rate"):
            _draw_line(left, rows, name, title)
    _draw_validation(left, rows)
    if any(row.get("total_loss") is not None for row in rows):
        right = left.twinx()
        _draw_line(right, rows, "total_loss", "Total loss (right axis)", linestyle="--")
        right.set_ylabel("Total loss")
        right.spines["top"].set_visible(False)
    _finish(left, "Training and validation", "Losses, IoU")  # only now do both axes know their epochs
    if any(axes.lines for axes in figure.axes):
        figure.legend(loc="upper left", bbox_to_anchor=(0.785, 0.91), frameon=False)
    return figure


def _make_figure(width: float, right: float) -> tuple[Figure, Axes]:
    """Return an empty figure of `width` inches whose axes end at the share `right` of it."""
    figure = Figure(figsize=(width, 4.5), dpi=110)
    FigureCanvasAgg(figure)
    # Fixed margins: to have them fitted would take as long as to draw.
    figure.subplots_adjust(left=0.8 / width, right=right, bottom=0.13, top=0.88)
    return figure, figure.add_subplot()


def _draw_line(axes: Axes, rows: Rows, name: str, label: str, linestyle: str = "-") -> None:
    epochs, values = _list_points(rows, name)
    marker = "o" if len(epochs) <= MARKED_POINTS else None
    if epochs:
        axes.plot(
            epochs, values, linestyle, color=COLORS[name], marker=marker, markersize=4, linewidth=1.6, label=label
        )


def _draw_validation(axes: Axes, rows: Rows) -> None:
    for name, (label, color) in VALIDATION.items():
        epochs, values = _list_points(rows, name)
        if not epochs:
            continue
        style = {"color": color, "linewidth": 1.6}
        axes.plot(epochs, values, marker="D", markersize=4.5, label=label, **style)
        if epochs[0] == 0:
            axes.axhline(values[0], linestyle=":", label=f"{label}, floor", **style)


def _list_points(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Return the epochs in which something was measured, and what was."""
    points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _scale_rate(axes: Axes, rows: Rows) -> None:
    rates = _list_points(rows, "learning_rate")[1]
    if rates and min(rates) > 0 and max(rates) / min(rates) >= 10:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _finish(axes: Axes, title: str, y_label: str) -> None:
    axes.set_title(title, fontweight="bold", pad=12)
    axes.set_xlabel("Epoch")
    axes.set_ylabel(y_label)
    axes.spines["top"].set_visible(False)
    if not any(each.lines for each in axes.figure.axes):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing measured yet", ha="center", va="center", color="#888888", transform=axes.transAxes)
        return
    count_epochs(axes)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
