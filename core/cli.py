"""The command line: the same stages as the pages, and the worker the pages start.

Exit code 0: done, or stopped with everything finished so far written. 2: bad input, one line on
stderr. Anything else is a defect, and shows its traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from core.errors import LimberError, OptionError, PlanError, Stopped
from core.events import Events
from core.records import Diagnosis

LISTS = ("models", "datasets", "metrics", "presets", "rules", "schemes")


class _Parser(argparse.ArgumentParser):
    """Bad options are bad input like any other: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        sentence = message[0].upper() + message[1:]
        raise OptionError(f"{sentence.rstrip('.')}. See {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        options = _parser().parse_args(arguments)
    except LimberError as error:
        return _refused(error)
    try:
        return _run(options)
    except LimberError as error:
        return _refused(error)


def _run(options: argparse.Namespace) -> int:
    terminal = sys.stderr.isatty() and not getattr(options, "json", False)
    with Events(
        getattr(options, "events", None), getattr(options, "stop_file", None), terminal=terminal
    ) as events:
        try:
            options.run(options, events)
        except Stopped as error:
            events.emit("stopped")
            print(error, file=sys.stderr)
            return 0
        except LimberError as error:
            events.emit("error", message=str(error))
            return _refused(error)
        except BrokenPipeError:
            # The reader of a listing has had enough.
            sys.stderr.close()
            return 0
        except MemoryError:
            message = "There is not enough memory. Take fewer images, a smaller batch or size."
            events.emit("error", message=message)
            return _refused(OptionError(message))
        except KeyboardInterrupt:
            events.emit("stopped")
            return 130
        except RuntimeError as error:
            if "out of memory" not in str(error):
                events.emit("error", message=f"An error of ours: {type(error).__name__}: {error}")
                raise
            message = "The device is out of memory. Take a smaller batch or image size."
            events.emit("error", message=message)
            return _refused(OptionError(message))
        except Exception as error:
            events.emit("error", message=f"An error of ours: {type(error).__name__}: {error}")
            raise
    return 0


def _refused(error: LimberError) -> int:
    print("limber: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


def _whole(text: str) -> int:
    try:
        return int(_plain(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _seed(text: str) -> int:
    number = _whole(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: give a whole number from 0")
    return number


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(_seed(part) for part in text.split(","))


def _part(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    digits = f"{part}{parts}"
    if not (slash and part and parts and digits.isascii() and digits.isdigit() and len(text) < 13):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; give one such as 1/4")
    return int(part), int(parts)


def _plain(text: str) -> str:
    """Return the text, unless it is a number in a spelling that only Python takes, as 1_000."""
    if "_" in text or not text.isascii():
        raise ValueError(text)
    return text


def _number(text: str) -> float:
    try:
        return float(_plain(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _add_measuring(commands: Any) -> None:
    measure = commands.add_parser("measure", help="measure a network on images")
    _add_model(measure)
    _add_data(measure, required=True)
    measure.add_argument("--samples", type=_whole, help="images (default 128)")
    measure.add_argument("--batch-size", type=_whole, help="images a batch (default 32)")
    measure.add_argument("--image-size", type=_whole, help="side in pixels")
    measure.add_argument("--device", default="auto", help="auto, cpu or cuda")
    measure.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    measure.add_argument("--seed", type=_seed, default=0)
    measure.add_argument("--histograms", action="store_true", help="keep each weight's histogram")
    measure.add_argument(
        "--transfer", action="store_true", help="also the slower pass: probe, LogME, CKA"
    )
    measure.add_argument("--part", type=_part, help="measure one part, such as 1/4, to merge later")
    _add_judging(measure)
    measure.add_argument("--out", type=Path, required=True, help="diagnosis.json")
    _add_events(measure)
    measure.set_defaults(run=_measure)

    merge = commands.add_parser("merge", help="merge measured parts into a diagnosis")
    merge.add_argument("parts", type=Path, nargs="+", help="files that measure --part wrote")
    merge.add_argument("--histograms", action="store_true", help="keep each weight's histogram")
    _add_judging(merge)
    merge.add_argument("--out", type=Path, required=True, help="diagnosis.json")
    _add_events(merge)
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

    plan = commands.add_parser("plan", help="make a plan from layer names")
    _add_model(plan)
    _add_data(plan, required=False)
    plan.add_argument("--classes", type=_whole, help="size of the head, without --data")
    plan.add_argument(
        "--layers",
        action="append",
        required=True,
        metavar="GLOB",
        help="layers to reset; repeat for more",
    )
    plan.add_argument("--syntax", choices=("glob", "regex", "type", "name"), default="glob")
    plan.add_argument(
        "--freeze", action="append", default=[], metavar="GLOB", help="layers that shall not train"
    )
    plan.add_argument("--scheme", default="architecture")
    plan.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a number of the scheme, such as shrink=0.4",
    )
    plan.add_argument("--seed", type=_seed, default=0)
    plan.add_argument("--name", default="plan", help="name of the arm")
    plan.add_argument("--out", type=Path, required=True, help="plan.json")
    plan.set_defaults(run=_plan)

    apply = commands.add_parser("apply", help="write the weights a plan makes")
    apply.add_argument("plan", type=Path)
    apply.add_argument("--out", type=Path, required=True, help="reinit.safetensors")
    apply.add_argument("--json", action="store_true", help="print the receipt as JSON")
    _add_events(apply)
    apply.set_defaults(run=_apply)

    tune = commands.add_parser("finetune", help="short fine-tunes: untouched against plans")
    _add_model(tune)
    _add_data(tune, required=True)
    tune.add_argument("--plan", type=Path, action="append", default=[], help="repeat for more arms")
    tune.add_argument(
        "--random-control",
        action="store_true",
        help="add an arm that resets as much in layers drawn at random",
    )
    tune.add_argument("--steps", type=_whole, help="optimiser steps (default 60)")
    tune.add_argument("--batch-size", type=_whole, help="images a step (default 32)")
    tune.add_argument("--seeds", type=_seeds, help="default 0,1,2")
    tune.add_argument("--lr", type=_number, help="learning rate (default: the model's)")
    tune.add_argument(
        "--head-lr", type=_number, help="learning rate of the new head (default: 1e-3 at least)"
    )
    tune.add_argument("--eval-every", type=_whole, help="steps between evaluations (default 10)")
    tune.add_argument("--image-size", type=_whole, help="side in pixels")
    tune.add_argument("--train-images", type=_whole, help="at most so many (default 600)")
    tune.add_argument("--val-images", type=_whole, help="at most so many (default 160)")
    tune.add_argument("--device", default="auto", help="auto, cpu or cuda")
    tune.add_argument("--out", type=Path, required=True, help="folder for the run")
    _add_events(tune)
    tune.set_defaults(run=_finetune)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a name, or timm:NAME, torchvision:NAME")
    parser.add_argument("--weights", choices=("pretrained", "none"), default="pretrained")
    parser.add_argument("--checkpoint", help="one's own weights for that architecture")


def _add_data(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--data",
        required=required,
        help="an embedded set, a folder, zip or npz, or torchvision:NAME:FOLDER",
    )


def _add_events(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", type=Path, help="append progress to this file, as JSON lines")
    parser.add_argument("--stop-file", type=Path, help="stop when this file appears")


def _list(options: argparse.Namespace, _: Events) -> None:
    import core

    rows: list[dict[str, Any]] = [
        row.model_dump(mode="json") for row in getattr(core, f"list_{options.what}")()
    ]
    if options.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row in rows:
        if options.what == "models":
            count = "" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f} M"
            here = "embedded" if row["embedded"] else ""
            print(f"{row['name']:<52} {count:>12}  {here}".rstrip())
        elif options.what == "datasets":
            images = (
                "" if row["images"] is None else f"{row['images']} images, {row['classes']} classes"
            )
            print(f"{row['name']:<28} {images:<28} {row['description']}".rstrip())
        else:
            about = row.get("description") or row.get("formula")
            print(f"{row['name']:<26} {row['title']}: {about}")
            for rule in row.get("rules", ()):
                print(f"  {rule['name']:<24} {rule['threshold']:g} ({rule['metric']})")


def _given(**given: Any) -> dict[str, Any]:
    """Return the options a person gave; those left out keep the stage's own defaults."""
    return {name: value for name, value in given.items() if value is not None}


def _numbers(texts: Sequence[str], option: str, example: str) -> dict[str, float]:
    """Read NAME=NUMBER options."""
    numbers: dict[str, float] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            numbers[key] = float(_plain(value))
        except ValueError:
            equals = ""
        if not equals:
            raise OptionError(f'{option} "{text}" is not NAME=NUMBER, such as {example}.')
    return numbers


def _judging(options: argparse.Namespace, kept: Diagnosis | None = None) -> dict[str, Any]:
    """Return preset and limits: what is given, else what a diagnosis was judged by."""
    from core.judge import DEFAULT_PRESET, checked_thresholds, preset_named

    preset, thresholds = DEFAULT_PRESET, {}
    if kept is not None:
        preset, thresholds = kept.preset, dict(kept.thresholds)
    if options.preset is not None:
        preset, thresholds = options.preset, {}
    thresholds |= _numbers(options.threshold, "--threshold", "dead-units=0.1")
    # Checked here, so that nobody measures for minutes first.
    checked_thresholds(preset_named(preset), thresholds)
    return {"preset": preset, "thresholds": thresholds}


def _or(given: int | None, default: int) -> int:
    return default if given is None else given


def _watcher(events: Events) -> Any:
    from core.pipeline import Watcher

    return Watcher(phase=events.phase, progress=events.progress, should_stop=events.should_stop)


def _check_out(path: Path, *, folder: bool, inputs: Sequence[Path] = ()) -> None:
    """Find out before the work, not after it, that the result has no place to go."""
    try:
        _check_place(path, folder=folder, inputs=inputs)
    except OSError as error:
        raise OptionError(f'--out "{path}" cannot be used ({error.strerror}).') from error


def _check_place(path: Path, *, folder: bool, inputs: Sequence[Path]) -> None:
    if folder and path.exists() and not path.is_dir():
        raise OptionError(f'--out "{path}" is a file; give a folder for the run.')
    if not folder and path.is_dir():
        raise OptionError(f'--out "{path}" is a folder; give a file name.')
    if not folder and path.exists() and not path.is_file():
        raise OptionError(f'--out "{path}" is a device, no ordinary file; give a file name.')
    written = [] if folder else [path, path.with_suffix(".units.safetensors")]
    for each in inputs:
        if each.exists() and any(place.exists() and place.samefile(each) for place in written):
            raise OptionError(f'--out "{path}" would overwrite "{each}"; give another file name.')
    nearest = path if folder else path.parent
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OptionError(f'--out "{path}" lies below "{nearest}", which is a file.')
    # A file is made and gone: permissions and read-only systems show in no other way.
    longest = path.name if folder else f"{path.stem}.units.safetensors"
    with tempfile.NamedTemporaryFile(dir=nearest, prefix=f".{longest}."):
        pass


def _measure(options: argparse.Namespace, events: Events) -> None:
    _check_out(options.out, folder=False)
    _judging(options)
    # Cheap checks first: nobody should wait for torch to learn of a typing error.
    from core.load import resolve_data, resolve_model

    data = resolve_data(options.data)
    spec = resolve_model(options.model, weights=options.weights, checkpoint=options.checkpoint)
    from core.pipeline import diagnose, measure_part

    chosen = {
        "device": options.device,
        "dtype": options.dtype,
        "seed": options.seed,
        "watcher": _watcher(events),
        **_given(
            samples=options.samples, batch_size=options.batch_size, image_size=options.image_size
        ),
    }
    if options.part is not None:
        if options.histograms or options.transfer:
            raise OptionError(
                "Parts keep sums alone; give --histograms to merge, and no --transfer."
            )
        part, parts = options.part
        if options.preset is not None or options.threshold:
            raise OptionError("Parts are not judged; give --preset and --threshold to merge.")
        images = measure_part(spec, data, options.out, part=part, parts=parts, **chosen)
        events.emit("done", out=str(options.out))
        print(f"Part {part} of {parts}: {images} images -> {options.out}")
        return
    found = diagnose(spec, data, histograms=options.histograms, transfer=options.transfer, **chosen)
    _report(*found, options, events)


def _merge(options: argparse.Namespace, events: Events) -> None:
    _check_out(options.out, folder=False, inputs=options.parts)
    from core.pipeline import merge_parts

    _judging(options)
    found = merge_parts(options.parts, histograms=options.histograms, watcher=_watcher(events))
    _report(*found, options, events)


def _report(
    diagnosis: Diagnosis,
    units: Mapping[str, Any],
    options: argparse.Namespace,
    events: Events,
) -> None:
    from core import rejudge, write_diagnosis

    diagnosis = rejudge(diagnosis, **_judging(options))
    write_diagnosis(diagnosis, units, options.out)
    events.emit("done", out=str(options.out))
    header = diagnosis.header
    print(
        f"{header.model_title} on {header.data_title}: {len(diagnosis.layers)} layers, "
        f"{header.samples} images, {header.device}, {header.wall_s:.1f} s -> {options.out}"
    )
    _say(diagnosis)


def _judge(options: argparse.Namespace, _: Events) -> None:
    from core import read_diagnosis, rejudge

    diagnosis = read_diagnosis(options.diagnosis)
    diagnosis = rejudge(diagnosis, **_judging(options, diagnosis))
    if options.json:
        found = [finding.model_dump(mode="json") for finding in diagnosis.findings]
        print(json.dumps(found, indent=1, ensure_ascii=False))
    elif diagnosis.findings:
        _say(diagnosis)
    else:
        print(f'Nothing stands out by the rules of "{diagnosis.preset}".')


def _say(diagnosis: Diagnosis) -> None:
    for finding in diagnosis.findings:
        print(
            f"  {finding.severity}: {finding.sentence} ({', '.join(finding.layers[:3])}"
            f"{', ...' if len(finding.layers) > 3 else ''})"
        )


def _plan(options: argparse.Namespace, _: Events) -> None:
    _check_out(options.out, folder=False)
    import core
    from core.export import write_whole
    from core.initialisers import scheme_numbers
    from core.records import Evidence, Pattern

    if options.data and options.classes is not None:
        raise OptionError("Give --data or --classes, not both: the data says how many classes.")
    numbers = _numbers(options.set, "--set", "shrink=0.4")
    scheme_numbers(options.scheme, numbers)
    classes, evidence = options.classes, Evidence()
    if options.data:
        data = core.outline_data(core.resolve_data(options.data))
        classes = len(data.classes)
        evidence = Evidence(data_fingerprint=data.fingerprint)
    spec = core.resolve_model(options.model, weights=options.weights, checkpoint=options.checkpoint)
    outline = core.outline_model(spec, classes=classes)
    chosen: list[str] = []
    for text in options.layers:
        chosen += core.match_layers(outline, text, syntax=options.syntax)
    frozen: list[str] = []
    for text in options.freeze:
        frozen += core.match_layers(outline, text, syntax=options.syntax)
    plan = core.make_plan(
        outline,
        chosen,
        scheme=options.scheme,
        scheme_parameters=numbers,
        seed=options.seed,
        name=options.name,
        freeze=frozen,
        evidence=evidence,
        patterns=[Pattern(text=text, syntax=options.syntax) for text in options.layers],
        resets_buffers=_resets_buffers(options.scheme),
    )
    write_whole(options.out, core.plan_json(plan))
    size = core.plan_size(outline, [target.layer for target in plan.targets])
    left = [name for name in chosen if name not in {target.layer for target in plan.targets}]
    print(
        f"{size.layers} layers, {size.parameters:,} of {size.total:,} parameters "
        f"({100 * size.fraction:.1f} %), {options.scheme} -> {options.out}"
    )
    if left:
        print(f"  left out, because the head is new already: {', '.join(dict.fromkeys(left))}")


def _resets_buffers(scheme: str) -> bool:
    from core.initialisers import SCHEMES

    return SCHEMES[scheme][0].resets_buffers


def _apply(options: argparse.Namespace, events: Events) -> None:
    _check_out(options.out, folder=False, inputs=[options.plan])
    from core.plan import read_plan

    plan = read_plan(options.plan)
    from core.pipeline import reset_weights

    events.phase("applying the plan")
    receipt = reset_weights(plan, options.out)
    digest = hashlib.sha256(options.out.read_bytes()).hexdigest()
    events.emit(
        "done", out=str(options.out), receipt=receipt.model_dump(mode="json"), file_sha256=digest
    )
    if options.json:
        print(json.dumps({**receipt.model_dump(mode="json"), "file_sha256": digest}, indent=1))
        return
    print(
        f"{len(plan.targets)} layers, {receipt.parameters_touched:,} of "
        f"{receipt.parameters_total:,} parameters reset -> {options.out}"
    )
    print(f"  SHA-256 {digest}")
    for warning in receipt.warnings:
        print(f"  warning: {warning}")


def _finetune(options: argparse.Namespace, events: Events) -> None:
    _check_out(options.out, folder=True)
    from core.load import outline_data, resolve_data, resolve_model
    from core.plan import read_plan

    plans = [read_plan(path) for path in options.plan]
    if not plans and options.random_control:
        raise PlanError("A random control needs a plan whose size it takes: give --plan.")
    data = resolve_data(options.data)
    spec = resolve_model(options.model, weights=options.weights, checkpoint=options.checkpoint)
    from core import pipeline
    from core.finetune import Settings

    classes = len(outline_data(data).classes)
    settings = Settings(
        steps=_or(options.steps, pipeline.DEFAULT_STEPS),
        batch_size=_or(options.batch_size, pipeline.DEFAULT_BATCH_SIZE),
        head_lr=options.head_lr,
        eval_every=_or(options.eval_every, pipeline.DEFAULT_EVAL_EVERY),
        lr=pipeline.outline_model(spec, classes=classes).default_lr
        if options.lr is None
        else options.lr,
    )
    trial = pipeline.prepare_trial(
        spec,
        data,
        plans,
        settings=settings,
        device=options.device,
        with_random_control=options.random_control,
        watcher=_watcher(events),
        **_given(
            seeds=options.seeds,
            image_size=options.image_size,
            train_images=options.train_images,
            val_images=options.val_images,
        ),
    )
    record = trial.record
    events.emit("record", record=record.model_dump(mode="json"))
    total = len(record.arms) * len(record.seeds) * record.steps
    steps = []
    done = 0
    for step in trial.steps:
        steps.append(step)
        events.step(pipeline.step_event(step))
        if step.step > 0:
            done += 1
            events.progress(done, total, "steps")
    finished = done == total
    comparison = pipeline.write_run(record, steps, options.out, finished=finished)
    if finished:
        events.emit("done", out=str(options.out))
    else:
        events.emit("stopped", out=str(options.out))
    print(
        f"{record.model_title} on {record.data_title}: {done} of {total} steps"
        f"{'' if finished else ' (stopped)'} -> {options.out}"
    )
    if len(record.arms) > 1:
        print(f"  {comparison.sentence}")
    for caveat in comparison.caveats if len(record.arms) > 1 else ():
        print(f"  {caveat}")
