"""The commands about plans: make, look at, apply, check, compare and pack them."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.catalogue.rules import rule_named, rule_option_names, rule_options
from core.cli.events import Events
from core.cli.options import (
    add_data,
    add_events,
    add_model,
    as_json,
    check_out,
    files_of,
    named_numbers,
    only_given,
    progress_of,
    real_number,
    same_file,
    seed_number,
    whole_number,
)
from core.cli.terminal import say, say_json
from core.errors import OptionError, PlanError, Remedy
from core.records import Diagnosis, ModelOutline, ModelSpec, Pattern, ReinitPlan

# What an export writes beside plan and weights.
WRITTEN = ("apply_plan.py", "USE.md")


def add_commands(commands: Any) -> None:
    """Add `plan`, `preview`, `apply`, `verify`, `diff`, `compose` and `export`."""
    _add_plan(commands)

    preview = commands.add_parser("preview", help="what a plan does, before any training")
    preview.add_argument("plan", type=Path)
    add_data(preview, required=False)
    preview.add_argument("--samples", type=whole_number, help="images (default 64)")
    preview.add_argument(
        "--batch-size",
        type=whole_number,
        help="images a batch (default 32)",
    )
    preview.add_argument("--image-size", type=whole_number, help="side in pixels")
    preview.add_argument("--device", default="auto", help="auto, cpu or cuda")
    preview.add_argument("--out", type=Path, help="write the figures to this file, as JSON")
    preview.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_events(preview)
    preview.set_defaults(run=_preview)

    apply = commands.add_parser("apply", help="write the weights a plan makes")
    apply.add_argument("plan", type=Path)
    apply.add_argument("--out", type=Path, required=True, help="reinit.safetensors")
    apply.add_argument("--json", action="store_true", help="print the receipt as JSON")
    add_events(apply)
    apply.set_defaults(run=_apply)

    verify = commands.add_parser("verify", help="whether weights are what a plan makes")
    verify.add_argument("plan", type=Path)
    verify.add_argument("weights", type=Path, help="reinit.safetensors")
    verify.add_argument("--json", action="store_true", help="print what was found as JSON")
    verify.set_defaults(run=_verify)

    diff = commands.add_parser("diff", help="in what two plans, or two files of weights, differ")
    diff.add_argument("first", type=Path)
    diff.add_argument("second", type=Path)
    diff.add_argument("--json", action="store_true", help="print the differences as JSON")
    diff.set_defaults(run=_diff)

    compose = commands.add_parser("compose", help="one plan that does what two do")
    compose.add_argument("first", type=Path)
    compose.add_argument("second", type=Path)
    compose.add_argument("--name", help="name of the arm")
    compose.add_argument("--out", type=Path, required=True, help="plan.json")
    compose.set_defaults(run=_compose)

    export = commands.add_parser("export", help="plan, weights and script for your own trainer")
    export.add_argument("plan", type=Path)
    export.add_argument("--out", type=Path, required=True, help="folder")
    export.add_argument("--json", action="store_true", help="print the receipt as JSON")
    add_events(export)
    export.set_defaults(run=_export)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="make a plan, by hand or by a published rule")
    add_model(plan, required=False)
    add_data(plan, required=False)
    plan.add_argument("--classes", type=whole_number, help="size of the head, without --data")
    plan.add_argument(
        "--rule", default="by-hand", metavar="NAME", help="what chooses (see: list rules)"
    )
    for option in rule_option_names().values():
        kind = {"number": real_number, "whole": whole_number}.get(option.kind, str)
        plan.add_argument(f"--{option.name}", type=kind, help=option.help)
    plan.add_argument("--like", type=Path, help="of the rule random: the plan to be matched")
    plan.add_argument("--diagnosis", type=Path, help="diagnosis.json, where a rule looks at one")
    plan.add_argument("--samples", type=whole_number, help="at most so many images")
    plan.add_argument(
        "--batch-size",
        type=whole_number,
        help="images a batch (default 32)",
    )
    plan.add_argument("--image-size", type=whole_number, help="side in pixels")
    plan.add_argument("--device", default="auto", help="auto, cpu or cuda")
    plan.add_argument(
        "--layers",
        action="append",
        default=[],
        metavar="GLOB",
        help="layers to reset, or that a rule may choose from; repeat for more",
    )
    plan.add_argument(
        "--units",
        action="append",
        default=[],
        metavar="LAYER=0,5",
        help="single units to reset by hand; repeat for more layers",
    )
    plan.add_argument("--syntax", choices=("glob", "regex", "type", "name"), default="glob")
    plan.add_argument(
        "--keep-head", action="store_true", help="leave a new head out of rules over weights"
    )
    plan.add_argument(
        "--freeze", action="append", default=[], metavar="GLOB", help="layers that shall not train"
    )
    plan.add_argument(
        "--lr-factor",
        action="append",
        default=[],
        metavar="GLOB=NUMBER",
        help="layers that train at a multiple of the learning rate",
    )
    plan.add_argument("--scheme", help="what is written (default: the rule's; see: list schemes)")
    plan.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a number of the scheme, such as shrink=0.4",
    )
    plan.add_argument("--seed", type=seed_number, default=0)
    plan.add_argument("--name", default="plan", help="name of the arm")
    plan.add_argument("--out", type=Path, required=True, help="plan.json")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON as well")
    add_events(plan)
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace, events: Events) -> None:
    _check_words(options)
    check_out(options, companions=("masks",))
    plan, outline, asked = (
        _ruled(options, events) if options.like is None else _matched_at_random(options, events)
    )
    import core

    plan = core.write_plan(plan, options.out)
    events.emit("done", out=str(options.out))
    if options.json:
        say_json(core.plan_json(plan).rstrip("\n"), indent=2)
        return
    _tell(plan, outline, options, asked)


def _ruled(
    options: argparse.Namespace, events: Events
) -> tuple[ReinitPlan, ModelOutline, tuple[str, ...]]:
    """Return the plan of a rule, its network, and the layers a person named."""
    import core
    from core.catalogue.schemes import SCHEMES, scheme_numbers

    rule, chosen = _checked_rule(options)
    numbers = named_numbers(options.set, "--set", "shrink=0.4")
    scheme = options.scheme or rule.scheme
    scheme_numbers(scheme, numbers)
    allowed = SCHEMES[scheme].granularities
    if rule.granularity in ("unit", "weight") and rule.granularity not in allowed:
        raise PlanError(
            f'The rule "{rule.name}" selects single {rule.granularity}s, and the scheme "{scheme}" '
            f"is for whole {' and '.join(allowed)}s. Choose another scheme."
        )
    diagnosis = None if options.diagnosis is None else core.read_diagnosis(options.diagnosis)
    spec = _spec(options, diagnosis)
    data = core.resolve_data(options.data) if options.data else None
    classes = options.classes
    if diagnosis is not None:
        classes = diagnosis.header.classes
    elif data is not None:
        classes = len(core.outline_data(data).classes)
    outline = core.outline_model(spec, classes=classes)
    patterns = tuple(Pattern(text=text, syntax=options.syntax) for text in options.layers)
    wish = core.Wish(
        scheme=options.scheme,
        numbers=numbers,
        seed=options.seed,
        name=options.name,
        layers=_matched(outline, options.layers, options.syntax) if options.layers else None,
        units=_units(options.units),
        patterns=patterns,
        freeze=_matched(outline, options.freeze, options.syntax),
        learning_rates=_rates(outline, options.lr_factor, options.syntax),
        head=not options.keep_head,
    )
    plan = core.plan_by_rule(
        spec,
        rule.name,
        chosen,
        classes=classes,
        sight=_sight(options),
        wish=wish,
        progress=progress_of(events),
    )
    return plan, outline, wish.layers or ()


def _sight(options: argparse.Namespace) -> Any:
    import core

    return core.Sight(
        data=core.resolve_data(options.data) if options.data else None,
        samples=options.samples,
        diagnosis=options.diagnosis,
        image_size=options.image_size,
        device=options.device,
        **only_given(batch_size=options.batch_size),
    )


def _matched_at_random(
    options: argparse.Namespace, events: Events
) -> tuple[ReinitPlan, ModelOutline, tuple[str, ...]]:
    """Return the random control of the plan that --like names, and its network."""
    import core
    from core.pipeline.applying import plan_spec

    if options.rule != "random":
        raise OptionError("--like only goes with the rule random.")
    own = [
        "scheme",
        "set",
        "layers",
        "units",
        "keep_head",
        "freeze",
        "lr_factor",
        "classes",
        "diagnosis",
    ]
    given = [
        name
        for name in (*rule_option_names(), *own)
        if getattr(options, name) not in (None, [], False)
    ]
    if given:
        raise OptionError(
            f"--{given[0].replace('_', '-')} does not go with --like: the control takes size, "
            "scheme, frozen layers and learning rates from the plan it is matched to."
        )
    like = core.read_plan(options.like)
    if options.model is None and (options.checkpoint or options.weights != "pretrained"):
        raise OptionError("--weights and --checkpoint belong to a --model.")
    if options.model is not None:
        spec = _spec(options, None)
        if spec != plan_spec(like):
            raise PlanError(
                f'"{options.like.name}" was made for {like.model.source}:{like.model.name} '
                f"({like.model.weights}), and --model says {spec.source}:{spec.name} "
                f"({spec.weights}). Leave --model out."
            )
    control = core.random_control(
        like,
        seed=options.seed,
        sight=_sight(options),
        progress=progress_of(events),
        **only_given(name=None if options.name == "plan" else options.name),
    )
    return control, core.plan_outline(control), ()


def _check_words(options: argparse.Namespace) -> None:
    if not 1 <= len(options.name) <= 200:
        raise OptionError(f"--name has {len(options.name)} letters; give 1 to 200.")
    for text in options.layers:
        if len(text) > 1024:
            raise OptionError(f"A pattern of --layers has {len(text)} letters; give at most 1,024.")


def _checked_rule(options: argparse.Namespace) -> tuple[Any, dict[str, float | str | None]]:
    """Return the rule and its options, refusing what cannot work before anything is loaded."""
    rule = rule_named(options.rule)
    chosen = {name: getattr(options, name) for name in rule_option_names()}
    if rule.name == "by-hand" and not options.layers and not options.units:
        raise OptionError(
            "The following arguments are required: --layers (or --units, or a --rule). See python "
            "-m core plan --help."
        )
    if options.data and options.classes is not None:
        raise OptionError("Give --data or --classes, not both: the data says how many classes.")
    if options.diagnosis is not None and options.classes is not None:
        raise OptionError("Give --diagnosis or --classes, not both: the first says how many.")
    if options.keep_head and rule.granularity != "weight":
        raise OptionError("--keep-head belongs to rules over single weights.")
    if options.units and rule.name != "by-hand":
        raise OptionError("--units only goes with the rule by-hand.")
    if rule.looks(chosen) and not (options.data or options.diagnosis):
        raise PlanError(f'The rule "{rule.name}" looks at {rule.needs}.', Remedy.GIVE_IMAGES)
    rule_options(rule, chosen)
    return rule, chosen


def _spec(options: argparse.Namespace, diagnosis: Diagnosis | None) -> ModelSpec:
    import core

    if options.model is None:
        if diagnosis is None:
            raise OptionError("Give --model, or a --diagnosis or --like that names one.")
        if options.checkpoint or options.weights != "pretrained":
            raise OptionError("--weights and --checkpoint belong to a --model.")
        return diagnosis.header.model
    return core.resolve_model(options.model, weights=options.weights, checkpoint=options.checkpoint)


def _matched(outline: ModelOutline, texts: Sequence[str], syntax: Any) -> tuple[str, ...]:
    import core

    names: dict[str, None] = {}
    for text in texts:
        names |= dict.fromkeys(core.match_layers(outline, text, syntax=syntax))
    return tuple(names)


def _units(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    by_layer: dict[str, tuple[int, ...]] = {}
    for text in texts:
        layer, equals, units = text.rpartition("=")
        try:
            numbers = tuple(whole_number(number) for number in units.split(","))
        except argparse.ArgumentTypeError:
            equals = ""
        if not equals:
            raise OptionError(f'--units "{text}" is not LAYER=NUMBER,NUMBER, such as conv1=0,5.')
        by_layer[layer] = (*by_layer.get(layer, ()), *numbers)
    return by_layer


def _rates(outline: ModelOutline, texts: Sequence[str], syntax: Any) -> dict[str, float]:
    rates: dict[str, float] = {}
    for text in texts:
        pattern, equals, factor = text.rpartition("=")
        try:
            number = real_number(factor)
        except argparse.ArgumentTypeError:
            equals = ""
        if not equals:
            raise OptionError(f'--lr-factor "{text}" is not GLOB=NUMBER, such as blocks.5=0.1.')
        rates |= dict.fromkeys(_matched(outline, [pattern], syntax), number)
    return rates


def _tell(
    plan: ReinitPlan, outline: ModelOutline, options: argparse.Namespace, asked: Sequence[str]
) -> None:
    import core

    schemes = ", ".join(dict.fromkeys(target.scheme.name for target in plan.targets))
    whole = [target.layer for target in plan.targets if target.granularity == "layer"]
    units = sum(len(target.units) for target in plan.targets)
    size = core.planned_size(outline, plan)
    which = f"{units} unit{'' if units == 1 else 's'} in " if units else ""
    say(
        f"{which}{size.layers} layers, {size.parameters:,} of "
        f"{size.total:,} parameters ({100 * size.fraction:.1f} %), {schemes} -> {options.out}"
    )
    heads = {layer.name for layer in outline.layers if layer.head and not outline.own_head}
    left = [name for name in asked if name not in whole]
    if options.rule == "by-hand" and plan.companion is None:
        for why, names in (
            ("because the head is new already", [name for name in left if name in heads]),
            ("because the scheme writes nothing there", [n for n in left if n not in heads]),
        ):
            if names:
                say(f"  left out, {why}: {', '.join(names)}")
    if plan.companion is not None:
        say(f"  selection in {plan.companion.file}")
    if plan.evidence.note:
        say(f"  {plan.evidence.note}")


def _preview(options: argparse.Namespace, events: Events) -> None:
    if options.out is not None:
        check_out(options)
    import core
    from core.files.whole import write_whole

    plan = core.read_plan(options.plan)
    data = core.resolve_data(options.data) if options.data else None
    preview = core.preview_plan(
        plan,
        data,
        image_size=options.image_size,
        device=options.device,
        progress=progress_of(events),
        **only_given(samples=options.samples, batch_size=options.batch_size),
    )
    text = preview.model_dump_json(indent=1)
    if options.out is not None:
        write_whole(options.out, text + "\n")
    events.emit("done", preview=json.loads(text))
    if options.json:
        say_json(text)
        return
    say(
        f"{preview.parameters_touched:,} of {preview.parameters_total:,} parameters touched, "
        f"{preview.wall_s:.1f} s"
    )
    if preview.output_kl is not None:
        same, before, after = (
            f"{100 * (figure or 0):.0f} %"
            for figure in (preview.agreement, preview.accuracy_before, preview.accuracy_after)
        )
        say(
            f"  outputs on {preview.samples} images of {preview.data_title}: "
            f"KL {preview.output_kl:.4g} nats, same answer on {same}, accuracy {before} -> {after}"
        )
    for layer in preview.layers:
        if layer.reset:
            change = "-" if layer.relative_change is None else f"{layer.relative_change:.3g}"
            behind = ""
            if layer.mean_abs is not None:
                behind = f", mean |h| {layer.mean_abs[0]:.3g} -> {layer.mean_abs[1]:.3g}"
            say(
                f"  {layer.layer}: {layer.selected:,} of {layer.parameters:,}, ||dW||/||W|| "
                f"{change}{behind}"
            )
    for warning in preview.warnings:
        say(f"  warning: {warning}")
    for note in preview.notes:
        say(f"  {note}")


def _apply(options: argparse.Namespace, events: Events) -> None:
    check_out(options)
    from core.files.plans import read_plan

    plan = read_plan(options.plan)
    from core.pipeline.applying import reset_weights

    events.phase("applying the plan")
    receipt = reset_weights(plan, options.out)
    digest = hashlib.sha256(options.out.read_bytes()).hexdigest()
    events.emit("done", out=str(options.out), receipt=as_json(receipt), file_sha256=digest)
    if options.json:
        say_json({**as_json(receipt), "file_sha256": digest})
        return
    say(
        f"{len(plan.targets)} layers, {receipt.parameters_touched:,} of "
        f"{receipt.parameters_total:,} parameters reset -> {options.out}"
    )
    say(f"  SHA-256 {digest}")
    for warning in receipt.warnings:
        say(f"  warning: {warning}")


def _verify(options: argparse.Namespace, _: Events) -> None:
    import core

    difference = core.verify_weights(core.read_plan(options.plan), options.weights)
    if options.json:
        say_json(difference.model_dump_json(indent=1))
    if difference.matches:
        if not options.json:
            say(f"{difference.tensors} tensors, every bit as the plan makes them.")
        return
    odd = [*difference.differing, *difference.missing, *difference.unexpected]
    parts = [
        f"{len(names)} {what}"
        for names, what in (
            (difference.differing, "differ"),
            (difference.missing, "are missing"),
            (difference.unexpected, "are not the plan's"),
        )
        if names
    ]
    raise PlanError(
        f'"{options.weights}" is not what the plan makes: of {difference.tensors} tensors '
        f'{", ".join(parts)}, first "{odd[0]}". Apply the plan again.'
    )


def _diff(options: argparse.Namespace, _: Events) -> None:
    import core

    if ".json" not in (options.first.suffix, options.second.suffix):
        _diff_weights(options)
        return
    first, second = core.read_plan(options.first), core.read_plan(options.second)
    rows = core.diff_plans(first, second)
    if options.json:
        say_json([as_json(row) for row in rows])
    elif not rows:
        say("The plans reset, freeze and train the same.")
    else:
        for row in rows:
            say(f"{row.what} {row.name}: {row.first or 'nothing'} | {row.second or 'nothing'}")


def _diff_weights(options: argparse.Namespace) -> None:
    import core

    rows = core.diff_weights(options.first, options.second)
    if options.json:
        say_json([as_json(row) for row in rows])
    elif not rows:
        say("Every tensor is the same, bit for bit.")
    else:
        for row in rows:
            change = "-" if row.relative_change is None else f"{row.relative_change:.3g}"
            say(f"{row.name}: {row.changed:,} of {row.entries:,}, ||dW||/||W|| {change}")


def _compose(options: argparse.Namespace, _: Events) -> None:
    check_out(options, companions=("masks",))
    import core

    if options.name is not None and not 1 <= len(options.name) <= 200:
        raise OptionError(f"--name has {len(options.name)} letters; give 1 to 200.")
    first, second = core.read_plan(options.first), core.read_plan(options.second)
    plan = core.write_plan(core.compose_plans(first, second, name=options.name), options.out)
    say(f"{len(plan.targets)} layers -> {options.out}")


def _check_export(folder: Path, plan: ReinitPlan, inputs: Sequence[Path]) -> None:
    """Refuse a folder in which an export would write over what it reads, or over another plan."""
    import core

    for path in inputs[1:]:
        if same_file(folder / "reinit.safetensors", path):
            raise OptionError(f'--out "{folder}" would overwrite "{path}"; give another folder.')
    there = [folder / name for name in ("plan.json", "reinit.safetensors", *WRITTEN)]
    taken = [path for path in there if path.exists()]
    if not taken or len(taken) == len(there):
        # Nothing, or an export, which a new one replaces.
        return
    with suppress(PlanError):
        if taken == there[:1] and core.plan_json(core.read_plan(taken[0])) == core.plan_json(plan):
            return
    raise OptionError(
        f'"{taken[0]}" is no export\'s, and this one would overwrite it; give another folder.'
    )


def _export(options: argparse.Namespace, events: Events) -> None:
    check_out(options, folder=True)
    import core

    plan = core.read_plan(options.plan)
    _check_export(options.out, plan, files_of(options.plan))
    receipt = core.export_plan(plan, options.out, progress=progress_of(events))
    events.emit("done", out=str(options.out), receipt=as_json(receipt))
    if options.json:
        say_json(receipt.model_dump_json(indent=1))
        return
    say(
        f"{receipt.parameters_touched:,} of {receipt.parameters_total:,} parameters reset -> "
        f"{options.out}"
    )
    say(f"  start with {options.out / 'USE.md'}")
    for warning in receipt.warnings:
        say(f"  warning: {warning}")
