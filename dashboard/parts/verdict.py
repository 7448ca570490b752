"""What a trial found: one sentence, one forest plot, what to do next, and what it must not hide."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from core.errors import LimberError
from core.records import OUTCOMES, ABComparison, ArmCurve, ArmDifference
from core.trial.verdict import compare_curves
from dashboard import charts, frame, plot, store, words
from dashboard.store.memo import Memo

_compared: Memo[ABComparison] = Memo(max_entries=16)


def compared(run: store.RunView, curves: tuple[ArmCurve, ...]) -> ABComparison | None:
    """Return the comparison of a run's arms; None where there is nothing to compare yet."""
    if len({curve.arm for curve in curves}) < 2:
        return None
    last = max((curve.steps[-1].step for curve in curves if curve.steps), default=0)
    # Only finished seeds are compared, so half a second later there is mostly nothing new.
    begun = tuple((curve.arm, curve.seed, curve.steps[-1].step == last) for curve in curves)
    key = (str(run.folder), last, begun, run.design is None)
    try:
        return _compared.get(key, lambda: compare_curves(curves, run.design))
    except LimberError:
        return None


def verdict(run: store.RunView, found: ABComparison | None) -> None:
    """Draw the sentence, the forest plot and what to do next."""
    st.subheader("Verdict so far" if run.live else "Verdict")
    if found is None:
        st.markdown(
            "No step is done yet."
            if run.live
            else "There is nothing to compare: no arm got far enough."
        )
        return
    with st.container(border=True):
        st.markdown(f"**{words.escape(found.sentence)}**")
        if found.what_next:
            st.markdown(words.escape(f"Next: {found.what_next}"))
    if found.state in ("screening", "claim") and charts.forest_rows(found):
        plot.plot(
            charts.forest_figure(found, dark=frame.is_dark()),
            key=f"forest_{run.id}",
            height=charts.forest_height(found),
            alt=_alt(found),
        )
        st.caption("A row is a comparison, with its 95 % interval.", help=words.FOREST_HELP)
    caveats = (*run.caveats, *found.caveats)
    if caveats:
        st.caption("\n".join(f"- {words.escape(caveat)}" for caveat in caveats))


def _alt(found: ABComparison) -> str:
    rows = [
        f"{row.arm}: {words.difference_line(row)}, {row.verdict or 'no verdict'}"
        for row, _ in charts.forest_rows(found)
    ]
    return words.clean("Forest plot of the comparisons. " + "; ".join(rows))


def arms_table(curves: tuple[ArmCurve, ...], found: ABComparison | None) -> None:
    """Draw each arm's figures; those that are not judged describe and claim nothing."""
    rows = []
    differences: dict[tuple[str, str], ArmDifference] = {
        (difference.arm, difference.measure): difference
        for difference in (found.differences if found else ())
    }
    noise = {each.arm: each for each in (found.image_noise if found else ())}
    judged = None if found is None else OUTCOMES[found.outcome]
    titles = {
        measure: f"{title} (judged)" if measure == judged else title
        for measure, title in words.DIFFERENCES.items()
    }
    for arm in charts.arm_order(curves):
        line = charts.spark(curves, arm)
        row: dict[str, object] = {
            "Arm": words.clean(arm),
            "Seeds": len({curve.seed for curve in curves if curve.arm == arm}),
            "Accuracy": line,
            "Last": line[-1] if line else None,
        }
        for measure, title in titles.items():
            difference = differences.get((arm, measure))
            row[title] = words.difference_line(difference) if difference else ""
        told = noise.get(arm)
        row["Answers that differ"] = None if told is None else told.discordant
        row["Resolvable (points)"] = None if told is None else 100 * told.resolvable
        rows.append(row)
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        key="arms",
        column_config={
            "Arm": st.column_config.TextColumn(pinned=True),
            "Accuracy": st.column_config.LineChartColumn(
                help="Validation accuracy over the run, mean over seeds."
            ),
            "Last": st.column_config.NumberColumn(format="percent"),
            "Answers that differ": st.column_config.NumberColumn(
                format="percent", help=words.RESOLVABLE_HELP
            ),
            "Resolvable (points)": st.column_config.NumberColumn(
                format="%.1f", help=words.RESOLVABLE_HELP
            ),
            **{
                title: st.column_config.TextColumn(help=words.DIFFERENCE_HELP[measure])
                for measure, title in titles.items()
            },
        },
    )
