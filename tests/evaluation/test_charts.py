import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finestsam.evaluation.charts import put_legend


@pytest.mark.parametrize("lines", [1, 6])
def test_a_legend_stands_beside_the_axes_and_within_the_figure(lines):
    figure = Figure(figsize=(5.9, 3.3))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number in range(lines):
        axes.plot([0, 1], [number, 1], label=f"this model, IoU 0.{number}")

    put_legend(axes)
    figure.tight_layout()
    figure.draw_without_rendering()

    legend, curves = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert legend.x0 >= curves.x1 and legend.x1 <= figure.bbox.x1 and curves.width > 0.5 * figure.bbox.width
