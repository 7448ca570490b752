"""Small pictures: images as a network sees them, and maps of what a layer makes of them."""

from __future__ import annotations

import base64
import functools
import io

import numpy as np
from PIL import Image
from plotly.colors import sample_colorscale, unlabel_rgb

from dashboard.charts.palette import DIVERGING

SHADES = 256


def picture(pixels: np.ndarray) -> str:
    """Return pixels (height, width, 3) uint8 as an address of their own.

    As a file, Streamlit would make a JPEG of it, and drop it once the page moves on.
    """
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def heat_picture(grid: np.ndarray) -> str:
    """Return a map (height, width) in Cividis, from its lowest to its highest value."""
    low, high = float(grid.min()), float(grid.max())
    share = (grid - low) / (high - low) if high > low else np.zeros_like(grid)
    return picture(_shades("Cividis", False)[_places(share)])


def signed_picture(grid: np.ndarray, reach: float, *, dark: bool) -> str:
    """Return a map (height, width) on a diverging scale from -reach over 0 to reach."""
    share = grid / (2 * reach) + 0.5 if reach > 0 else np.full_like(grid, 0.5)
    return picture(_shades("", dark)[_places(share)])


def _places(share: np.ndarray) -> np.ndarray:
    return np.clip(share * (SHADES - 1), 0, SHADES - 1).round().astype(np.uint8)


@functools.cache
def _shades(scale: str, dark: bool) -> np.ndarray:
    """Return a scale as (256, 3) uint8; the name "" means the diverging one of the page."""
    ends = np.linspace(0, 1, SHADES)
    if not scale:
        stops = np.array([float(str(stop)) for stop, _ in DIVERGING[dark]])
        colours = np.array(
            [[int(str(shade)[i : i + 2], 16) for i in (1, 3, 5)] for _, shade in DIVERGING[dark]]
        )
        mixed = np.stack([np.interp(ends, stops, colours[:, part]) for part in range(3)], axis=1)
        return mixed.round().astype(np.uint8)
    sampled = [unlabel_rgb(shade) for shade in sample_colorscale(scale, list(ends))]
    return np.array(sampled).round().astype(np.uint8)
