"""`inspect`: open files from somebody else within limits, and say what is in them.

The pages run this in a process of its own before they take a file, so that a file made to fill the
memory or to hang its reader ends this process and not the server.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from core.cli.events import Events
from core.cli.options import add_data, add_model, as_json, otherwise, whole_number
from core.cli.remedies import sentence
from core.cli.terminal import say, say_json
from core.errors import LimberError, OptionError, Remedy, told
from core.limits import is_no_memory, limit_memory, limit_time

if TYPE_CHECKING:
    from core.records import DataSpec, Preprocessing, SampleImage

DEFAULT_SIZE = 224
# Larger pictures are scaled down before they go to a page, which shows them the size of a stamp.
SHOWN_PX = 512
# A network runs out of nothing with less: torch and timm alone hold a gigabyte of data.
LEAST_MB = 256
LEAST_S = 1


def add_commands(commands: Any) -> None:
    """Add `inspect`."""
    inspect = commands.add_parser(
        "inspect", help="open weights, images or a plan within limits; say what is in them"
    )
    add_model(inspect, required=False)
    inspect.add_argument("--classes", type=whole_number, help="classes of the new head")
    add_data(inspect, required=False)
    inspect.add_argument(
        "--images", type=whole_number, default=0, help="also decode so many images"
    )
    inspect.add_argument("--image-size", type=whole_number, help="side in pixels of those images")
    inspect.add_argument("--interpolation", default="bicubic", help="how those are resized")
    inspect.add_argument("--plan", type=Path, help="plan.json")
    inspect.add_argument("--companion", type=Path, help="the plan's file of chosen entries")
    inspect.add_argument("--memory-mb", type=whole_number, help="most memory in MiB (Linux, macOS)")
    inspect.add_argument("--seconds", type=whole_number, help="most time")
    inspect.add_argument("--json", action="store_true", help="print what was found as JSON")
    inspect.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace, _: Events) -> None:
    if options.model is None and options.data is None and options.plan is None:
        raise OptionError("There is nothing to inspect. Give --model, --data or --plan.")
    _set_limits(options)
    try:
        seen = _within_limits(options)
    except LimberError as error:
        _say_refusal(error, options)
        raise
    if options.json:
        say_json(seen, indent=None)
    else:
        _say(seen)


def _within_limits(options: argparse.Namespace) -> dict[str, Any]:
    try:
        return _found(options)
    except (LimberError, MemoryError, RuntimeError, OSError) as error:
        if options.memory_mb is not None and is_no_memory(error):
            raise _too_large(options) from error
        raise


def _say_refusal(error: LimberError, options: argparse.Namespace) -> None:
    """Tell a program what a person reads on stderr, so that it can name its own remedy."""
    if options.json:
        say_json({"error": told(error, sentence(error))}, indent=None)
        sys.stdout.flush()


def _found(options: argparse.Namespace) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    if options.plan is not None:
        from core.files.plans import read_plan

        try:
            companion = None if options.companion is None else options.companion.read_bytes()
        except OSError as error:
            raise OptionError(
                f'--companion "{options.companion}" cannot be read ({error.strerror}).'
            ) from error
        # With a companion the plan is text, so that the two need not lie under their own names.
        source = options.plan if companion is None else _bytes_of(options.plan)
        answer["plan"] = as_json(read_plan(source, companion=companion))
    if options.data is not None:
        from core.load import outline_data, resolve_data

        data = resolve_data(options.data)
        answer["data"] = as_json(outline_data(data))
        if options.images:
            answer["images"] = _images(data, options)
    if options.model is not None:
        from core.load import resolve_model
        from core.pipeline.batches import outline_model

        spec = resolve_model(options.model, weights=options.weights, checkpoint=options.checkpoint)
        answer["model"] = as_json(outline_model(spec, classes=options.classes))
    return answer


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OptionError(f'--plan "{path}" cannot be read ({error.strerror}).') from error


def _images(data: DataSpec, options: argparse.Namespace) -> list[dict[str, Any]]:
    from core.load import sample_images

    size = otherwise(options.image_size, DEFAULT_SIZE)
    if not 1 <= options.images <= 64 or not 16 <= size <= 1024:
        raise OptionError("Give --images from 1 to 64, and --image-size from 16 to 1024.")
    return [
        _as_shown(image)
        for image in sample_images(
            data, _resizing(size, options.interpolation), count=options.images
        )
    ]


def _resizing(size: int, interpolation: str) -> Preprocessing:
    from core.records import Preprocessing

    # Pictures for a person are resized and cropped, not normalised, so that these do not count.
    return Preprocessing(
        image_size=size, interpolation=interpolation, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )


def _as_shown(image: SampleImage) -> dict[str, Any]:
    return {
        "label": image.label,
        "split": image.split,
        "name": image.name,
        "original_size": image.original_size,
        "original_png": _text(_small(image.original_png)),
        "input_png": _text(image.input_png),
    }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _small(png: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        if max(image.size) <= SHOWN_PX:
            return png
        image.thumbnail((SHOWN_PX, SHOWN_PX))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
    return buffer.getvalue()


def _set_limits(options: argparse.Namespace) -> None:
    if options.memory_mb is not None:
        if options.memory_mb < LEAST_MB:
            raise OptionError(f"--memory-mb is {options.memory_mb}; give at least {LEAST_MB}.")
        limit_memory(options.memory_mb, lambda: _end(_too_large(options), options))
    if options.seconds is not None:
        if options.seconds < LEAST_S:
            raise OptionError(f"--seconds is {options.seconds}; give at least {LEAST_S}.")
        limit_time(options.seconds, lambda: _end(_too_long(options), options))


def _what(options: argparse.Namespace) -> str:
    files = (options.plan, options.checkpoint, options.data)
    names = [f'"{Path(file).name}"' for file in files if file]
    return " and ".join(names) or f'model "{options.model}"'


def _too_large(options: argparse.Namespace) -> OptionError:
    return OptionError(
        f"{_what(options)} needs more than {options.memory_mb:,} MB of memory to open: it may be "
        "damaged, or made to fill the memory.",
        Remedy.MORE_MEMORY,
    )


def _too_long(options: argparse.Namespace) -> OptionError:
    return OptionError(
        f"{_what(options)} was not open after {options.seconds} seconds.", Remedy.MORE_TIME
    )


def _end(error: OptionError, options: argparse.Namespace) -> NoReturn:
    sys.stderr.write(f"limber: {sentence(error)}\n")
    sys.stderr.flush()
    with suppress(OSError, ValueError):
        _say_refusal(error, options)
    # The reader is somewhere inside a library; nothing it holds needs an orderly end.
    os._exit(2)


def _say(found: dict[str, Any]) -> None:
    if "plan" in found:
        plan = found["plan"]
        say(f'Plan "{plan["name"]}": {len(plan["targets"])} layers of {plan["model"]["name"]}')
    if "data" in found:
        data = found["data"]
        counts = ", ".join(
            f"{sum(by_class):,} {split}" for split, by_class in data["counts"].items()
        )
        say(f"{data['title']}: {len(data['classes'])} classes, {counts} images")
        for note in data["notes"]:
            say(f"  {note}")
    if "model" in found:
        model = found["model"]
        say(f"{model['title']}: {len(model['layers'])} layers, {model['parameters']:,} parameters")
        for note in model["notes"]:
            say(f"  {note['sentence']}")
