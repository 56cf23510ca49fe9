"""Plot a run's curves from the rows of its metrics.csv.

Without pyplot, because it would change the settings of a notebook that calls this.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finestsam.evaluation.charts import count_epochs, put_legend
from finestsam.runtime.whole_files import replacing

Rows = Sequence[Mapping[str, float | None]]

# Colours (Okabe and Ito's, which the colour-blind can distinguish too) of what is plotted against epochs.
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
OTHER_COLOR = "#882255"
# Measured in validation: how a line is called, and its colour.
VALIDATION = {
    "val_per_mask_iou": ("Validation IoU", "#E69F00"),
    "val_generator_ap": ("Generator AP", "#D55E00"),
    "val_generator_f1": ("Generator F1", "#0072B2"),
    "val_generator_ar_100": ("Generator AR@100", "#882255"),
    "val_classes_ar_100": ("Generator AR@100\nby category", "#44AA99"),
    "val_miou": ("Validation mIoU", "#E69F00"),
}
# Training curves that are plotted in the validation's panel.
VALIDATED = {"iou": ("val_per_mask_iou",), "pixel_accuracy": ("val_miou",)}
# Curves that are no losses are plotted in the validation's panel.
MEASURED = ("iou", "predicted_iou", "pixel_accuracy", "class_accuracy")
MARKED_POINTS = 30  # lines with more points have no markers
# Inches; the legend is to the right of the axes.
PANEL_HEIGHT, MARGIN, LEGEND_WIDTH = 3.6, 0.8, 2.4


def plot_curves(rows: Rows, measures: Mapping[str, str], folder: Path) -> list[Path]:
    """Write a PNG for every curve, and one of all together, to `folder/plots`, and return their paths.

    Args:
        rows: of a RunLog; epoch 0 is the baseline.
        measures: titles of what training measures, by column.
        folder: of the run.
    """
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    titles = {**measures, "learning_rate": "Learning rate"}
    figures = {name: _plot_one(rows, name, title) for name, title in titles.items()}
    figures["all_metrics"] = _plot_all(rows, titles)
    paths = []
    for name, figure in figures.items():
        paths.append(plots / f"{name}.png")
        with replacing(paths[-1], is_lasting=False) as partial:
            figure.savefig(partial, format="png")
    return paths


def _plot_one(rows: Rows, name: str, title: str) -> Figure:
    figure, (axes,) = _make_figure(panels=1)
    _plot_line(axes, rows, name, "Training")
    validated = VALIDATED.get(name, ())
    _plot_validation(axes, rows, validated)
    if name == "learning_rate":
        _scale_rate(axes, rows)
    is_beside_baseline = any(row["epoch"] == 0 and row.get(each) is not None for row in rows for each in validated)
    _finish(axes, f"{title} (dotted: baseline)" if is_beside_baseline else title)
    return figure


def _plot_all(rows: Rows, titles: Mapping[str, str]) -> Figure:
    """Plot three panels, one below the other: losses; other curves and validation with baseline; learning rate."""
    figure, (losses, measures, rate) = _make_figure(panels=3)
    for name, title in titles.items():
        if name != "learning_rate":
            _plot_line(measures if name in MEASURED else losses, rows, name, title)
    _plot_validation(measures, rows, VALIDATION)
    _plot_line(rate, rows, "learning_rate", titles["learning_rate"])
    _scale_rate(rate, rows)
    _finish(losses, "Training: losses")
    _finish(measures, "Training and validation (dotted: baseline)")
    _finish(rate, "Learning rate")
    return figure


def _make_figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    """Return an empty figure of panels below each other, with room for their legends to the right."""
    width, height = 6.2 + LEGEND_WIDTH, panels * PANEL_HEIGHT
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    # Fixed margins, because fitting them takes as long as plotting.
    figure.subplots_adjust(
        left=MARGIN / width, right=1 - LEGEND_WIDTH / width, bottom=0.5 / height, top=1 - 0.5 / height, hspace=0.42
    )
    return figure, [figure.add_subplot(panels, 1, panel + 1) for panel in range(panels)]


def _plot_line(axes: Axes, rows: Rows, name: str, label: str) -> None:
    epochs, values = _list_points(rows, name)
    marker = "o" if len(epochs) <= MARKED_POINTS else None
    if epochs:
        color = COLORS.get(name, OTHER_COLOR)
        axes.plot(epochs, values, color=color, marker=marker, markersize=4, linewidth=1.6, label=label)


def _plot_validation(axes: Axes, rows: Rows, names: Iterable[str]) -> None:
    """Plot the validation's curves, each with the baseline's value as a dotted line."""
    for name in names:
        label, color = VALIDATION[name]
        epochs, values = _list_points(rows, name)
        if not epochs:
            continue
        style = {"color": color, "linewidth": 1.6}
        axes.plot(epochs, values, marker="D", markersize=4.5, label=label, **style)
        if epochs[0] == 0:
            axes.axhline(values[0], linestyle=":", **style)


def _list_points(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Return the epochs in which a value was measured, and these values."""
    points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _scale_rate(axes: Axes, rows: Rows) -> None:
    rates = _list_points(rows, "learning_rate")[1]
    if rates and min(rates) > 0 and max(rates) / min(rates) >= 10:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontweight="bold", pad=10)
    axes.set_xlabel("Epoch")
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing measured yet", ha="center", va="center", color="#888888", transform=axes.transAxes)
        return
    count_epochs(axes)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    if len(axes.lines) > 1:
        put_legend(axes)
