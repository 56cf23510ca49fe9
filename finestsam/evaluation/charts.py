"""The charts of the report, as SVG inside the page."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from finestsam.evaluation.coco_scores import TRACED_RECALLS, CocoScorer
from finestsam.evaluation.own_run import History
from finestsam.evaluation.thresholds import Calibration

# Okabe and Ito's colours, which colour-blind people can distinguish.
OURS, THEIRS = "#0072B2", "#999999"
# The curves of a run's validations: label and colour.
VALIDATED = {
    "val_generator_ar_100": ("generator, recall\nof 100 masks", "#882255"),
    "val_generator_ap": ("generator, average\nprecision", "#D55E00"),
    "val_per_mask_iou": ("one point, IoU", "#009E73"),
}


def plot_precision(ours: CocoScorer, theirs: CocoScorer | None) -> str:
    """Plot precision against recall of the generator's masks."""
    figure, axes = _make_axes("Precision and recall of the generator", "recall", "precision")
    for scorer, color, label in ((theirs, THEIRS, "baseline"), (ours, OURS, "this model")):
        for (iou, precision), style in zip(scorer.trace_precision().items() if scorer else (), "-:", strict=False):
            axes.plot(TRACED_RECALLS, precision, style, color=color, label=f"{label}, IoU {iou:g}")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    return _finish(figure)


def plot_clicks(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Plot the mean IoU by the number of corrective clicks; theirs may be empty."""
    figure, axes = _make_axes("IoU after corrective clicks", "clicks on the object", "mean IoU")
    for clicks, color, label in ((theirs, THEIRS, "baseline"), (ours, OURS, "this model")):
        if clicks:
            axes.plot(list(clicks), list(clicks.values()), "o-", color=color, label=label)
    axes.set(ylim=(0, 1), xticks=list(ours))
    return _finish(figure)


def plot_calibration(found: Calibration) -> str:
    """Plot the measured IoU against the predicted IoU."""
    title = f"Predicted and measured IoU (error {found.error:.3f})"
    figure, axes = _make_axes(title, "predicted IoU", "measured IoU")
    axes.plot([0, 1], [0, 1], ":", color="#666666", label="perfect")
    axes.plot(np.clip(found.centres, 0, 1), found.measured, "o-", color=OURS, label="candidates")
    axes.plot(*np.array(found.knots).T, "-", color="#E69F00", alpha=0.8, label="correction")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return _finish(figure)


def plot_history(history: History) -> list[str]:
    """Plot the loss of a run by epoch, and its validation metrics; metrics without values are left out."""
    charts = []
    if history.trace("total_loss")[0]:
        charts.append(_plot_loss(history))
    if any(history.trace(name)[0] for name in VALIDATED):
        charts.append(_plot_validation(history))
    return charts


def _plot_loss(history: History) -> str:
    figure, axes = _make_axes("Training: loss", "epoch", "mean over objects")
    axes.plot(*history.trace("total_loss"), "o-", color="black", markersize=3, label="total loss")
    return _finish_history(figure, history)


def _plot_validation(history: History) -> str:
    """Plot each metric, and the baseline's value as a dotted line."""
    figure, axes = _make_axes("Training: validation (dotted: baseline)", "epoch", "")
    for name, (label, color) in VALIDATED.items():
        epochs, values = history.trace(name)
        if not epochs:
            continue
        axes.plot(epochs, values, "o-", color=color, markersize=3, label=label)
        if epochs[0] == 0:
            axes.axhline(values[0], linestyle=":", color=color)
    return _finish_history(figure, history)


def _finish_history(figure: Figure, history: History) -> str:
    """Mark the epoch of the weights, and return the figure as SVG."""
    (axes,) = figure.axes
    axes.set_ylim(bottom=0)
    count_epochs(axes)
    if history.kept_epoch is not None:
        axes.axvline(history.kept_epoch, color="#666666", linewidth=0.8, label="these weights")
    return _finish(figure)


def count_epochs(axes: Axes) -> None:
    """Label the x axis with whole epochs, even where there is only one."""
    low, high = axes.get_xlim()
    if high - low < 1:
        axes.set_xlim(low - 0.4, high + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def put_legend(axes: Axes) -> None:
    """Put the legend to the right of the axes, where it hides no curve."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False, fontsize="small")


def _make_axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.9, 3.3))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure, axes


def _finish(figure: Figure) -> str:
    """Return the figure as SVG."""
    (axes,) = figure.axes
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    put_legend(axes)
    figure.tight_layout()
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
