"""The table of attribution methods: what each says of a layer, and where it applies. No torch."""

from __future__ import annotations

from typing import Literal

from core.errors import OptionError, Remedy
from core.records.base import Value

MethodName = Literal["gradcam", "integrated-gradients", "conductance", "ablation"]


class MethodInfo(Value):
    """One method.

    Attributes:
        name: Key.
        title: Plain words.
        captum: Captum's public class.
        reads: How to read a picture of it.
        formula: Plain text.
        baseline: What it compares with; "" for none.
        complete: Whether its values sum to the change of the target from the baseline.
        applies_to: Which layers have it.
        why_no_sum: Why nothing is promised of the sum of its values; "" where it is.
        why_no_infidelity: Why Captum's infidelity is not taken; "" where it is.
        source: Paper.
    """

    name: MethodName
    title: str
    captum: str
    reads: str
    formula: str
    baseline: str
    complete: bool
    applies_to: str
    why_no_sum: str = ""
    why_no_infidelity: str = ""
    source: str


BLACK = "the mean colour of the images the weights were trained on (0 after normalisation)"

METHODS: tuple[MethodInfo, ...] = (
    MethodInfo(
        name="gradcam",
        title="Grad-CAM",
        captum="LayerGradCam",
        reads="Where in the image the layer's channels push the target up (positive) or down "
        "(negative). Coarse: as fine as the layer's own grid.",
        formula="sum over channels c of (mean over places of d target / d h_c) h_c",
        baseline="",
        complete=False,
        applies_to="layers whose output has channels and two axes of places, channels first",
        why_no_sum="Grad-CAM takes the gradient at the image alone and averages it over places",
        why_no_infidelity="Grad-CAM spreads one gradient a channel over all places, so its values "
        "predict no change of a single entry of the layer's output",
        source="Selvaraju et al. 2017, arXiv:1610.02391",
    ),
    MethodInfo(
        name="integrated-gradients",
        title="Integrated gradients at the layer",
        captum="LayerIntegratedGradients",
        reads="How much each entry of the layer's output carries of the change of the target when "
        "the output goes from that for the baseline image to that for this one; all together make "
        "up the whole change.",
        formula="integral over a from 0 to 1 of d target / d h(a) dh, h(a) between the layer's "
        "outputs for the baseline and for the image",
        baseline=BLACK,
        complete=True,
        applies_to="any layer",
        source="Sundararajan et al. 2017, arXiv:1703.01365",
    ),
    MethodInfo(
        name="conductance",
        title="Conductance",
        captum="LayerConductance",
        reads="How much of the change of the target flows through each unit on the way from the "
        "baseline image to this one. What runs past the layer, as through a residual sum, is not "
        "in it.",
        formula="sum over inputs i of (x_i - x'_i) times the integral of (d target / d h)(d h / "
        "d x_i)",
        baseline=BLACK,
        complete=False,
        applies_to="any layer",
        why_no_sum="what runs past the layer, as through a residual sum, is not in it",
        source="Dhamdhere et al. 2018, arXiv:1805.12233",
    ),
    MethodInfo(
        name="ablation",
        title="What would be lost",
        captum="LayerFeatureAblation",
        reads="By how much the target falls when a unit's (or a whole layer's) output is set to 0, "
        "or a residual block gives its input instead of its output. Near 0: resetting it loses "
        "nothing that this target needs.",
        formula="target - target with h_u = 0",
        baseline="an output of 0; of a residual block, its input",
        complete=False,
        applies_to="any layer",
        why_no_sum="each part is taken out alone, and what parts do together counts for each",
        why_no_infidelity="an ablation gives a loss for each part, not a value for each entry of "
        "the layer's output",
        source="Captum, Kokhlikyan et al. 2020, arXiv:2009.07896",
    ),
)


def method_named(name: str) -> MethodInfo:
    """Return the method of that name.

    Raises:
        OptionError: There is none.
    """
    for method in METHODS:
        if method.name == name.replace("_", "-"):
            return method
    known = ", ".join(method.name for method in METHODS)
    raise OptionError(f'The method is "{name}"; there are auto, {known}.', Remedy.OTHER_METHOD)
