"""The command `attribute`: what a layer carries, by Captum."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from core.cli.events import Events
from core.cli.options import (
    add_data,
    add_events,
    add_model,
    check_out,
    only_given,
    progress_of,
    seed_number,
    whole_number,
)
from core.cli.terminal import say


def add_command(commands: Any) -> None:
    """Add `attribute`."""
    command = commands.add_parser("attribute", help="say what a layer carries on some images")
    add_model(command)
    add_data(command, required=True)
    command.add_argument(
        "--layer", required=True, help="a layer's name; for an ablation also all or blocks"
    )
    command.add_argument(
        "--method",
        default="auto",
        help="auto, gradcam, integrated-gradients, conductance or ablation",
    )
    command.add_argument("--groups", type=whole_number, help="bars of an ablation (default 64)")
    command.add_argument("--plan", type=Path, help="also after this plan")
    command.add_argument(
        "--trained", type=Path, action="append", default=[], help="also with these trained weights"
    )
    command.add_argument("--target", help="features or class")
    command.add_argument("--images", type=whole_number, help="how many (default 4)")
    command.add_argument("--steps", type=whole_number, help="points on the path (default 32)")
    command.add_argument("--image-size", type=whole_number, help="side in pixels")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.add_argument("--seed", type=seed_number, default=0)
    command.add_argument("--out", type=Path, required=True, help="attribution.json")
    add_events(command)
    command.set_defaults(run=_attribute)


def _attribute(options: argparse.Namespace, events: Events) -> None:
    check_out(options, companions=("arrays",))
    # Cheap checks first: nobody should wait for torch to learn of a typing error.
    import core

    data = core.resolve_data(options.data)
    spec = core.resolve_model(options.model, weights=options.weights, checkpoint=options.checkpoint)
    plan = None if options.plan is None else core.read_plan(options.plan)
    settings = core.AttributeSettings(
        method=options.method,
        target=options.target,
        device=options.device,
        seed=options.seed,
        **only_given(
            images=options.images,
            steps=options.steps,
            groups=options.groups,
            image_size=options.image_size,
        ),
    )
    attribution, arrays = core.attribute(
        spec,
        data,
        options.layer,
        settings,
        plan=plan,
        trained=options.trained,
        progress=progress_of(events),
    )
    core.write_attribution(attribution, arrays, options.out)
    events.emit("done", out=str(options.out))
    say(
        f"{attribution.layer} of {attribution.model_title} on {len(attribution.labels)} images of "
        f"{attribution.data_title} by {attribution.method} -> {options.out}"
    )
    for state in attribution.states:
        gap = "" if state.gap is None else f", sums off by {state.gap:.2%}"
        off = "" if state.infidelity is None else f", infidelity {state.infidelity:.3g}"
        say(f"  {state.name}: {state.seconds:.1f} s{gap}{off}")
