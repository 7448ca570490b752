"""The parts of an open layer that look inside: saturation seen, by unit and class; attention."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import streamlit as st

from core.records import LayerReport
from dashboard import charts, frame, plot, store, words

Looks = Mapping[str, tuple[np.ndarray, np.ndarray | None]]

SPREAD_PX = 300
CLASS_ROW_PX = 26
PICTURE_PX = 64
NOT_LOOKED = (
    "This measurement did not look inside the layers. Measure again to see distributions here."
)
WHOLE = "All"
UNIT = "layer_unit"


def saturation(
    space: store.Workspace, stored: store.Stored, layer: LayerReport, looks: Looks
) -> None:
    """Draw the distribution of what feeds the layer's activation, of the layer or of one unit."""
    if "counts" not in looks:
        figure = layer.metrics.get("saturated_fraction")
        reason = None if figure is None else figure.reason
        st.caption(words.escape(reason or NOT_LOOKED))
        return
    unit = _unit(looks["counts"][0].shape[0])
    spread = _spread(looks, unit)
    activation = layer.activation_type or "activation"
    share, twin = spread.share_flat(), spread.share_flat(twin=True)
    of = "the inputs" if unit is None else f"the inputs of unit {unit}"
    st.markdown(
        words.escape(
            f"{words.share(share)} of {of} of {activation} lie where its derivative is practically "
            f"0; in the fresh twin {words.share(twin)}."
        )
    )
    plot.plot(
        charts.saturation_figure(
            spread,
            {name: looks[f"curve_{name}"][0] for name in ("x", "h", "slope")},
            activation=activation,
            dark=frame.is_dark(),
        ),
        key="saturation",
        height=SPREAD_PX,
        alt=f"Distribution of the inputs of {activation}, network and fresh twin, with the "
        "function and its derivative; the flat parts are shaded",
    )
    st.caption(
        "Shaded: the flat parts. Bars inside them are inputs that pass no gradient back. Open "
        "ends hold all that lies beyond."
    )
    _classes(space, looks, unit)
    if unit is not None:
        _images(space, stored, looks, unit)
    if "factor_counts" in looks:
        plot.plot(
            charts.spread_figure(
                charts.Spread(edges=looks["factor_edges"][0], counts=looks["factor_counts"][0]),
                "the other factor of the gate",
                dark=frame.is_dark(),
            ),
            key="factor",
            height=SPREAD_PX - 80,
            alt="Distribution of what the activation is multiplied with",
        )
        st.caption("This activation is a gate: its output is multiplied with these values.")


def _unit(units: int) -> int | None:
    """Draw the choice of a unit; None means the whole layer."""
    if (st.session_state.get(UNIT) or 0) >= units:
        # Chosen in another, wider layer.
        st.session_state[UNIT] = None
    number = st.number_input(
        "Unit",
        min_value=0,
        max_value=units - 1,
        value=None,
        step=1,
        placeholder=f"{WHOLE}, or 0-{units - 1}",
        key=UNIT,
        width=220,
        help="Empty: the whole layer. A unit is a channel, or a feature of the tokens.",
    )
    return None if number is None else int(number)


def _spread(looks: Looks, unit: int | None) -> charts.Spread:
    own, twin = looks["counts"]
    chosen = slice(None) if unit is None else slice(unit, unit + 1)
    return charts.Spread(
        edges=looks["edges"][0],
        counts=own[chosen].sum(0, dtype=np.int64),
        twin=None if twin is None else twin[chosen].sum(0, dtype=np.int64),
        flat=looks["flat"][0],
    )


def _classes(space: store.Workspace, looks: Looks, unit: int | None) -> None:
    own, twin = looks["by_class"]
    classes = store.data_outline(space.choice).classes
    if len(classes) != len(own):
        # Measured with other images than those chosen now.
        classes = tuple(f"class {place}" for place in range(len(own)))

    def of(shares: np.ndarray) -> np.ndarray:
        return shares.mean(1) if unit is None else shares[:, unit]

    st.markdown("**By class**")
    plot.plot(
        charts.class_bars_of(
            of(own), None if twin is None else of(twin), classes, dark=frame.is_dark()
        ),
        key="saturation_classes",
        height=100 + CLASS_ROW_PX * len(classes),
        alt=f"Share of saturated inputs for the images of each of {len(classes)} classes",
    )


def _images(space: store.Workspace, stored: store.Stored, looks: Looks, unit: int) -> None:
    images = store.inside_of(stored).get("images", {})
    if "thumbnails" not in images:
        return
    pictures, labels = images["thumbnails"][0], images["labels"][0]
    classes = store.data_outline(space.choice).classes
    for title, which in (("Drive it most", "strongest"), ("Drive it least", "weakest")):
        st.markdown(f"**{words.escape(title)}**")
        numbers = looks[which][0][:, unit]
        values = looks[f"{which}_value"][0][:, unit]
        with st.container(horizontal=True, gap="small"):
            for number, value in zip(numbers, values, strict=True):
                if number >= len(pictures):
                    continue
                label = int(labels[number])
                name = classes[label] if label < len(classes) else f"class {label}"
                with st.container(width=PICTURE_PX + 30, gap="xsmall"):
                    st.image(
                        charts.picture(pictures[number]),
                        width=PICTURE_PX,
                        alt=words.clean(f"{name}, mean input {words.figure(float(value))}"),
                    )
                    st.caption(words.escape(f"{name}, {words.figure(float(value))}"))
    st.caption("By the mean input of the unit over the image, among the images measured.")


def attention(
    inside: Mapping[str, Looks],
    looks: Looks,
    figures: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    """Draw how evenly each head spreads its attention, and where it looks on some images."""
    plot.plot(
        charts.head_bars(*figures["head_attention_entropy"], dark=frame.is_dark()),
        key="heads",
        height=SPREAD_PX - 60,
        alt="Attention entropy of each head, with the fresh twin's",
    )
    st.caption(
        "1: the head looks everywhere alike. 0: it always looks at one token, and the softmax "
        "passes no gradient back."
    )
    if "attention" not in looks:
        st.caption(
            "No maps: this attention works in windows, hides its weights, or mixes what belongs to "
            "several images."
        )
        return
    maps = _grids(looks["attention"][0]), _grids(looks["attention_mean"][0])
    if maps[0] is None or maps[1] is None:
        st.caption("No maps: the tokens do not lie on a square grid.")
        return
    heads = maps[0].shape[1]
    # Without tokens that stand for no place, the first query is the upper left patch.
    extra = looks["attention"][0].shape[2] > maps[0].shape[2] * maps[0].shape[3]
    first = "The class token" if extra else "The first patch"
    kind = st.segmented_control(
        "Attention of",
        (first, "All tokens"),
        default=first,
        required=True,
        key="attention_of",
    )
    chosen = maps[0] if kind == first else maps[1]
    head = int(st.number_input("Head", 0, heads - 1, 0, 1, key="attention_head", width=120))
    pictures = inside.get("images", {}).get("thumbnails")
    with st.container(horizontal=True, gap="small"):
        for place, grid in enumerate(chosen[:, head]):
            with st.container(width=PICTURE_PX * 2, gap="xsmall"):
                if pictures is not None:
                    st.image(
                        charts.picture(pictures[0][place]), width=PICTURE_PX * 2, alt="The image"
                    )
                st.image(
                    charts.heat_picture(grid), width=PICTURE_PX * 2, alt="Where this head looks"
                )
    st.caption("Top: the image as the network sees it. Bottom: attention, brightest where most.")


def _grids(weights: np.ndarray) -> np.ndarray | None:
    """Return attention (images, heads, side, side) without the tokens that stand for no place."""
    keys = weights.shape[2]
    side = int(np.sqrt(keys))
    if side < 2:
        return None
    # Class and register tokens stand first.
    patches = weights[:, :, keys - side * side :].astype(np.float32)
    return patches.reshape(*weights.shape[:2], side, side)
