"""Axes that can be read."""

from matplotlib.figure import Figure

from gmt_tune.reporting.plots import Curve, draw_curves


def test_a_density_that_varies_by_rounding_alone_is_drawn_flat_with_ticks_that_differ():
    figure = Figure(figsize=(4, 2))
    curve = Curve("run", [1, 2, 3], [0.19999961, 0.19999959, 0.20000012])
    draw_curves(figure, [curve])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert low < min(curve.y) and max(curve.y) < high and high - low >= 0.0019
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) > 1 and len(set(labels)) == len(labels)


def test_losses_close_to_each_other_have_ticks_to_read_them_by():
    figure = Figure(figsize=(4, 2))
    draw_curves(figure, [Curve("run", [20, 40, 60], [1.048, 0.981, 0.961])], log=True)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3
