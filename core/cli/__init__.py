"""The command line: the same stages as the pages, and the worker the pages start.

Exit code 0: done, or stopped with everything finished so far written. 2: bad input, one line on
stderr. Anything else is a defect, and shows its traceback.
"""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from core.cli import attributing, finetuning, inspecting, plans
from core.cli.events import Events
from core.cli.options import (
    add_data,
    add_events,
    add_model,
    as_json,
    check_out,
    named_numbers,
    only_given,
    part_of,
    progress_of,
    seed_number,
    whole_number,
)
from core.cli.remedies import sentence
from core.cli.terminal import quiet_libraries, say, say_error, say_json
from core.errors import LimberError, OptionError, Stopped, told
from core.files.disk import no_room, settle_temporary_folder, trouble
from core.files.whole import CompanionKind
from core.records import Diagnosis

LISTS = (
    "models",
    "datasets",
    "metrics",
    "presets",
    "rules",
    "schemes",
    "rivals",
    "augmentations",
)


class _Parser(argparse.ArgumentParser):
    """Bad options are bad input like any other: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        sentence = message[0].upper() + message[1:]
        raise OptionError(f"{sentence.rstrip('.')}. See {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a letter gets its number.
            stream.reconfigure(errors="backslashreplace")
    settle_temporary_folder()
    try:
        for argument in sys.argv[1:] if arguments is None else arguments:
            _check_text(argument)
        options = _parser().parse_args(arguments)
    except LimberError as error:
        return _refused(error)
    try:
        with quiet_libraries():
            return _run(options)
    except LimberError as error:
        return _refused(error)


def _check_text(argument: str) -> None:
    # Names go into JSON, and a name that is no text cannot; a file's name has no NUL.
    if "\0" in argument:
        raise OptionError(f"{argument[:200]!r} holds a NUL. Give another name.")
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise OptionError(f"{argument[:200]!r} is no text in UTF-8. Give another name.") from None


def _run(options: argparse.Namespace) -> int:
    terminal = sys.stderr.isatty() and not getattr(options, "json", False)
    with (
        Events(
            getattr(options, "events", None), getattr(options, "stop_file", None), terminal=terminal
        ) as events,
        ExitStack() as options.held,
    ):
        try:
            options.run(options, events)
            sys.stdout.flush()
        except Stopped as error:
            events.emit("stopped")
            say_error(sentence(error))
            return 0
        except LimberError as error:
            return _refused(error, events)
        except BrokenPipeError:
            # The reader of a listing has had enough.
            sys.stderr.close()
            return 0
        except OSError as error:
            if not no_room(error) and error.errno != errno.EIO:
                events.emit("error", message=f"An error of ours: {type(error).__name__}: {error}")
                raise
            fact = f"The output cannot be written ({error.strerror})."
            if error.filename is not None:
                fact = trouble(error, Path(os.fsdecode(error.filename)))
            return _refused(OptionError(fact), events)
        except MemoryError:
            fact = "There is not enough memory. Take fewer images, a smaller batch or size."
            return _refused(OptionError(fact), events)
        except KeyboardInterrupt:
            events.emit("stopped")
            return 130
        except RuntimeError as error:
            if "out of memory" not in str(error):
                events.emit("error", message=f"An error of ours: {type(error).__name__}: {error}")
                raise
            fact = "The device is out of memory. Take a smaller batch or image size."
            return _refused(OptionError(fact), events)
        except Exception as error:
            events.emit("error", message=f"An error of ours: {type(error).__name__}: {error}")
            raise
    return 0


def _refused(error: LimberError, events: Events | None = None) -> int:
    """Say what happened and what to type next, on stderr and to who follows the events."""
    words = sentence(error)
    if events is not None:
        events.emit("error", **told(error, words))
    say_error(f"limber: {words}")
    return 2


def _add_measuring(commands: Any) -> None:
    measure = commands.add_parser("measure", help="measure a network on images")
    add_model(measure)
    add_data(measure, required=True)
    measure.add_argument("--samples", type=whole_number, help="images (default 128)")
    measure.add_argument(
        "--batch-size",
        type=whole_number,
        help="images a batch (default 32, or fewer so that measuring takes four batches)",
    )
    measure.add_argument("--image-size", type=whole_number, help="side in pixels")
    measure.add_argument("--device", default="auto", help="auto, cpu or cuda")
    measure.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    measure.add_argument("--seed", type=seed_number, default=0)
    measure.add_argument("--histograms", action="store_true", help="keep each weight's histogram")
    measure.add_argument(
        "--inside",
        action="store_true",
        help="also look inside each layer: distributions, classes, images, attention",
    )
    measure.add_argument(
        "--transfer", action="store_true", help="also the slower pass: probe, LogME, CKA"
    )
    measure.add_argument(
        "--part", type=part_of, help="measure one part, such as 1/4, to merge later"
    )
    _add_judging(measure)
    measure.add_argument("--out", type=Path, required=True, help="diagnosis.json")
    add_events(measure)
    measure.set_defaults(run=_measure)

    merge = commands.add_parser("merge", help="merge measured parts into a diagnosis")
    merge.add_argument("parts", type=Path, nargs="+", help="files that measure --part wrote")
    merge.add_argument("--histograms", action="store_true", help="keep each weight's histogram")
    _add_judging(merge)
    merge.add_argument("--out", type=Path, required=True, help="diagnosis.json")
    add_events(merge)
    merge.set_defaults(run=_merge)

    judging = commands.add_parser("judge", help="say what stands out in a diagnosis")
    judging.add_argument("diagnosis", type=Path, help="diagnosis.json")
    _add_judging(judging)
    judging.add_argument("--json", action="store_true", help="print the findings as JSON")
    judging.set_defaults(run=_judge)


def _add_judging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="set of rules (see: list presets)")
    parser.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="RULE=VALUE",
        help="another limit for a rule of the preset; repeat for more",
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m core", description="Plasticity before fine-tuning.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    listing = commands.add_parser("list", help="what there is to choose from")
    listing.add_argument("what", choices=LISTS)
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_list)

    _add_measuring(commands)

    plans.add_commands(commands)
    inspecting.add_commands(commands)
    attributing.add_command(commands)

    finetuning.add_command(commands)
    return parser


def _list(options: argparse.Namespace, _: Events) -> None:
    import core

    rows: list[dict[str, Any]] = [as_json(row) for row in getattr(core, f"list_{options.what}")()]
    if options.json:
        say_json(rows)
        return
    for row in rows:
        if options.what == "models":
            count = "" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f} M"
            here = "embedded" if row["embedded"] else ""
            say(f"{row['name']:<52} {count:>12}  {here}".rstrip())
        elif options.what == "datasets":
            images = (
                "" if row["images"] is None else f"{row['images']} images, {row['classes']} classes"
            )
            say(f"{row['name']:<28} {images:<28} {row['description']}".rstrip())
        else:
            about = row.get("description") or row.get("formula") or row.get("does")
            say(f"{row['name']:<26} {row['title']}: {about}")
            for rule in row.get("rules", ()):
                say(f"  {rule['name']:<24} {rule['threshold']:g} ({rule['metric']})")


def _judging(options: argparse.Namespace, kept: Diagnosis | None = None) -> dict[str, Any]:
    """Return preset and limits: what is given, else what a diagnosis was judged by."""
    from core.catalogue.checks import DEFAULT_PRESET, checked_thresholds, preset_named

    preset, thresholds = DEFAULT_PRESET, {}
    if kept is not None:
        preset, thresholds = kept.preset, dict(kept.thresholds)
    if options.preset is not None:
        preset, thresholds = options.preset, {}
    thresholds |= named_numbers(options.threshold, "--threshold", "dead-units=0.1")
    # Checked here, so that nobody measures for minutes first.
    checked_thresholds(preset_named(preset), thresholds)
    return {"preset": preset, "thresholds": thresholds}


def _measure(options: argparse.Namespace, events: Events) -> None:
    beside: tuple[CompanionKind, ...] = ("units", "inside") if options.inside else ("units",)
    check_out(options, companions=() if options.part else beside)
    _judging(options)
    # Cheap checks first: nobody should wait for torch to learn of a typing error.
    from core.load import resolve_data, resolve_model

    data = resolve_data(options.data)
    spec = resolve_model(options.model, weights=options.weights, checkpoint=options.checkpoint)
    from core.pipeline.measuring import MeasureSettings, diagnose, diagnose_inside
    from core.pipeline.parts import measure_part

    progress = progress_of(events)
    settings = MeasureSettings(
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
        **only_given(
            samples=options.samples, batch_size=options.batch_size, image_size=options.image_size
        ),
    )
    if options.part is not None:
        if options.histograms or options.transfer or options.inside:
            raise OptionError(
                "Parts keep only sums; give --histograms to merge, and no --transfer or --inside."
            )
        part, parts = options.part
        if options.preset is not None or options.threshold:
            raise OptionError("Parts are not judged; give --preset and --threshold to merge.")
        images = measure_part(
            spec, data, options.out, settings, part=part, parts=parts, progress=progress
        )
        events.emit("done", out=str(options.out))
        say(f"Part {part} of {parts}: {images} images -> {options.out}")
        return
    if options.inside:
        diagnosis, units, inside = diagnose_inside(
            spec, data, settings, transfer=options.transfer, progress=progress
        )
        _report(diagnosis, units, options, events, inside)
        return
    diagnosis, units = diagnose(
        spec,
        data,
        settings,
        histograms=options.histograms,
        transfer=options.transfer,
        progress=progress,
    )
    _report(diagnosis, units, options, events)


def _merge(options: argparse.Namespace, events: Events) -> None:
    check_out(options, companions=("units",))
    from core.pipeline.parts import merge_parts

    _judging(options)
    merged = merge_parts(options.parts, histograms=options.histograms, progress=progress_of(events))
    _report(*merged, options, events)


def _report(
    diagnosis: Diagnosis,
    units: Mapping[str, Any],
    options: argparse.Namespace,
    events: Events,
    inside: Mapping[str, Any] | None = None,
) -> None:
    from core import rejudge, write_diagnosis

    diagnosis = rejudge(diagnosis, **_judging(options))
    write_diagnosis(diagnosis, units, options.out, inside=inside)
    events.emit("done", out=str(options.out))
    header = diagnosis.header
    say(
        f"{header.model_title} on {header.data_title}: {len(diagnosis.layers)} layers, "
        f"{header.samples} images, {header.device}, {header.wall_s:.1f} s -> {options.out}"
    )
    for note in header.notes:
        say(f"  note: {note}")
    _say(diagnosis)


def _judge(options: argparse.Namespace, _: Events) -> None:
    from core import read_diagnosis, rejudge

    diagnosis = read_diagnosis(options.diagnosis)
    diagnosis = rejudge(diagnosis, **_judging(options, diagnosis))
    if options.json:
        findings = [as_json(finding) for finding in diagnosis.findings]
        say_json(findings)
        for remark in diagnosis.remarks:
            # The list on stdout holds only findings, for programs that read it.
            say_error(remark.sentence)
        return
    if not diagnosis.findings:
        say(f'Nothing stands out by the rules of "{diagnosis.preset}".')
    _say(diagnosis)


def _say(diagnosis: Diagnosis) -> None:
    header = diagnosis.header
    for whose, loss in (("network", header.loss), ("fresh twin", header.twin_loss)):
        if not math.isfinite(loss):
            say(
                f"  warning: The {whose}'s loss on these images is not a finite number: the pass "
                "overflows, and what depends on it has a reason in place of a figure."
            )
    for finding in diagnosis.findings:
        say(f"  {finding.severity}: {finding.sentence}{_first_layers(finding.layers)}")
    for remark in diagnosis.remarks:
        say(f"  {remark.sentence}{_first_layers(remark.layers)}")


def _first_layers(layers: Sequence[str]) -> str:
    return f" ({', '.join(layers[:3])}{', ...' if len(layers) > 3 else ''})"
