"""Records -> Plotly figures. All they know of the page is whether its background is dark."""

from dashboard.charts.axes import heatmap_height
from dashboard.charts.curves import Measure, arm_order, curve_figure, spark
from dashboard.charts.folding import FOLDED, folded, stages
from dashboard.charts.forest import forest_figure, forest_height, forest_rows
from dashboard.charts.images import class_bars, intensity_bars
from dashboard.charts.inside import (
    Spread,
    batches_figure,
    carried_bars,
    class_bars_of,
    gradient_figure,
    head_bars,
    saturation_figure,
    sorted_units_figure,
    spectrum_figure,
    spread_figure,
)
from dashboard.charts.layers import PLAN_ROW, HeatView, layer_heatmap, layer_strip
from dashboard.charts.pictures import heat_picture, picture, signed_picture
from dashboard.charts.units import UNIT_COLUMNS, unit_heatmap, weight_histogram

__all__ = [
    "FOLDED",
    "PLAN_ROW",
    "UNIT_COLUMNS",
    "HeatView",
    "Measure",
    "Spread",
    "arm_order",
    "batches_figure",
    "carried_bars",
    "class_bars",
    "class_bars_of",
    "curve_figure",
    "folded",
    "forest_figure",
    "forest_height",
    "forest_rows",
    "gradient_figure",
    "head_bars",
    "heat_picture",
    "heatmap_height",
    "intensity_bars",
    "layer_heatmap",
    "layer_strip",
    "picture",
    "saturation_figure",
    "signed_picture",
    "sorted_units_figure",
    "spark",
    "spectrum_figure",
    "spread_figure",
    "stages",
    "unit_heatmap",
    "weight_histogram",
]
