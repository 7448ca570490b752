"""Colours and dashes of the figures, for a light background (False) and a dark one (True)."""

from __future__ import annotations

ACCENT = {False: "#D55E00", True: "#F0A35E"}
INK = {False: "#10181A", True: "#F4F7F7"}
FROZEN = {False: "#0072B2", True: "#56B4E9"}
QUIET = {False: "#6B7478", True: "#98A3A6"}
# Okabe and Ito without grey, which belongs to the untouched arm, in the order of the themes' lists.
ARM_COLOURS = {
    False: ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    True: ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00"),
}
ARM_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# The middle is the page's background, so that "no different from the fresh twin" recedes.
DIVERGING = {
    False: [[0, "#3B1F7A"], [0.25, "#8E83C4"], [0.5, "#F4F2EE"], [0.75, "#E0913A"], [1, "#8A3D00"]],
    True: [[0, "#B9A7FF"], [0.25, "#6A5BA8"], [0.5, "#1E2528"], [0.75, "#A8631D"], [1, "#FFC071"]],
}
FADED = {False: "#D5D9DB", True: "#3A4448"}
# Background of the mark "no ratio".
MARKED = {False: "#FFFFFF", True: "#0A0F11"}
