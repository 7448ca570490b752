"""Records -> Plotly figures. All they know of the page is whether its background is dark."""

from dashboard.charts.axes import heatmap_height
from dashboard.charts.curves import Measure, arm_order, curve_figure, spark
from dashboard.charts.images import class_bars, intensity_bars
from dashboard.charts.layers import HeatView, layer_heatmap, layer_strip
from dashboard.charts.units import UNIT_COLUMNS, unit_heatmap, weight_histogram

__all__ = [
    "UNIT_COLUMNS",
    "HeatView",
    "Measure",
    "arm_order",
    "class_bars",
    "curve_figure",
    "heatmap_height",
    "intensity_bars",
    "layer_heatmap",
    "layer_strip",
    "spark",
    "unit_heatmap",
    "weight_histogram",
]
