"""Options that several commands share, and checks before the work begins."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.cli.events import Events
from core.cli.terminal import say_error
from core.errors import OptionError, Remedy
from core.files.claims import Holder, claimed
from core.files.disk import no_room, trouble
from core.files.inputs import is_there, read_input, strict_json
from core.files.plans import MAX_PLAN_BYTES, MAX_PLAN_VALUES
from core.files.whole import CompanionKind, companion_path
from core.records.base import Value
from core.records.diagnosis import MAX_DIAGNOSIS_BYTES, MAX_DIAGNOSIS_VALUES

# Endings of what commands write: one of these in a folder of images is no image.
OURS = (".json", ".safetensors")
# Of one trial.
MOST_SEEDS = 1000


def whole_number(text: str) -> int:
    """Read a whole number."""
    try:
        return int(_plain(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def seed_number(text: str) -> int:
    """Read a seed."""
    number = whole_number(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: give 0 to 2^63 - 1")
    return number


def seed_list(text: str) -> tuple[int, ...]:
    """Read how many seeds there are, or which, with commas between them."""
    if "," not in text:
        many = whole_number(text)
        if many == 0:
            # No seeds would be no trial; so this can only be the seed.
            return (0,)
        if not 1 <= many <= MOST_SEEDS:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number of seeds: give 1 to {MOST_SEEDS}, or which with commas, "
                "such as 3,4,5"
            )
        return tuple(range(many))
    text = text.removesuffix(",")
    return tuple(seed_number(part) for part in text.split(","))


def name_list(text: str) -> tuple[str, ...]:
    """Read names with commas between them; "none" is none."""
    return () if text == "none" else tuple(part.strip() for part in text.split(","))


def part_of(text: str) -> tuple[int, int]:
    """Read a part such as 1/4."""
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


def real_number(text: str) -> float:
    """Read a number."""
    try:
        return float(_plain(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options that name a network."""
    parser.add_argument("--model", required=required, help="a name, or timm:NAME, torchvision:NAME")
    parser.add_argument("--weights", choices=("pretrained", "none"), default="pretrained")
    parser.add_argument("--checkpoint", help="one's own weights for that architecture")


def add_data(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the option that names images."""
    parser.add_argument(
        "--data",
        required=required,
        help="an embedded set, a folder, zip or npz, or torchvision:NAME:FOLDER",
    )


def add_events(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a page follows a command."""
    parser.add_argument("--events", type=Path, help="append progress to this file, as JSON lines")
    parser.add_argument("--stop-file", type=Path, help="stop when this file appears")


def only_given(**given: Any) -> dict[str, Any]:
    """Return the options a person gave; those left out keep the stage's own defaults."""
    return {name: value for name, value in given.items() if value is not None}


def named_numbers(texts: Sequence[str], option: str, example: str) -> dict[str, float]:
    """Read NAME=NUMBER options.

    Args:
        texts: As they were typed.
        option: The option, for the message.
        example: One that is right, for the message.

    Raises:
        OptionError: One is not NAME=NUMBER.
    """
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


def otherwise(given: int | None, default: int) -> int:
    """Return a number that was given, or the default."""
    return default if given is None else given


def progress_of(events: Events) -> Any:
    """Return a progress that tells events and stops on a wish."""
    from core.pipeline.progress import Progress

    return Progress(phase=events.phase, advance=events.progress, should_stop=events.should_stop)


def as_json(value: Value) -> dict[str, Any]:
    """Return a value as JSON content; numbers that are not finite are strings."""
    content: dict[str, Any] = json.loads(value.model_dump_json())
    return content


def files_of(plan: Path) -> list[Path]:
    """Return a plan's file, and the checkpoint and companion it names; none need be there."""
    files = [plan]
    with suppress(OSError, ValueError, TypeError):
        content = strict_json(read_input(plan, most=MAX_PLAN_BYTES), most_values=MAX_PLAN_VALUES)
        for place, key in (("model", "checkpoint"), ("companion", "file")):
            named = content.get(place) if isinstance(content, dict) else None
            name = named.get(key) if isinstance(named, dict) else None
            if isinstance(name, str) and "\0" not in name:
                files.append(Path(name) if key == "checkpoint" else plan.parent / Path(name).name)
    return files


def _named_by(diagnosis: Path) -> list[Path]:
    """Return a diagnosis, and the checkpoint, images and companions it names."""
    files = [diagnosis, companion_path(diagnosis, "units"), companion_path(diagnosis, "inside")]
    with suppress(OSError, ValueError, TypeError, KeyError):
        data = read_input(diagnosis, most=MAX_DIAGNOSIS_BYTES)
        header = strict_json(data, most_values=MAX_DIAGNOSIS_VALUES)["header"]
        for named in (header["model"]["checkpoint"], header["data"]["name"]):
            if isinstance(named, str) and "\0" not in named:
                files.append(Path(named))
    return files


def inputs_of(options: argparse.Namespace) -> list[Path]:
    """Return every file and folder a command was told to read, by whatever option."""
    given = vars(options)
    files = [Path(given[name]) for name in ("checkpoint", "data") if given.get(name)]
    for name in ("plan", "like", "first", "second"):
        plans = given.get(name) or []
        for plan in plans if isinstance(plans, list) else [plans]:
            files += files_of(Path(plan))
    if given.get("diagnosis"):
        files += _named_by(Path(given["diagnosis"]))
    return [*files, *given.get("parts", []), *given.get("trained", [])]


def same_file(first: Path, second: Path) -> bool:
    """Whether two paths lead to one file that exists."""
    return is_there(first) and is_there(second) and first.samefile(second)


def check_out(
    options: argparse.Namespace, *, folder: bool = False, companions: Sequence[CompanionKind] = ()
) -> None:
    """Find out before the work, not after it, that the result has no place to go, and claim it.

    The claim is `options.held`'s to let go of, at the end of the command.

    Args:
        options: --out says where; whatever else they name must not be written over.
        folder: Whether it is a folder.
        companions: What lies beside the result.

    Raises:
        OptionError: The place cannot be written to, or another command writes there.
    """
    path: Path = options.out
    try:
        _check_place(path, folder=folder, inputs=inputs_of(options), companions=companions)
        claim = claimed(path, folder=folder, what=options.command)
        holder = options.held.enter_context(claim)
    except OSError as error:
        if no_room(error):
            raise OptionError(trouble(error, path), Remedy.START_AGAIN) from error
        raise OptionError(
            f'"{path}" cannot be used ({error.strerror}).', Remedy.OTHER_PLACE
        ) from error
    if isinstance(holder, Holder):
        raise OptionError(
            f'--out "{path}" is being written by {holder.words()}. Wait until it is done, or give '
            f"another {'folder' if folder else 'file name'}."
        )
    if not holder.locked:
        say_error(
            f'limber: the file system of --out "{path}" has no locks. See to it that no other '
            "machine writes there."
        )


def _check_place(
    path: Path, *, folder: bool, inputs: Sequence[Path], companions: Sequence[CompanionKind]
) -> None:
    if not folder and path.is_symlink():
        raise OptionError(f'--out "{path}" is a link; give the place it leads to.')
    if folder and path.exists() and not path.is_dir():
        raise OptionError(f'--out "{path}" is a file; give a folder for the run.')
    if not folder and path.is_dir():
        raise OptionError(f'--out "{path}" is a folder; give a file name.')
    if not folder and path.exists() and not path.is_file():
        raise OptionError(f'--out "{path}" is a device, no ordinary file; give a file name.')
    beside = [companion_path(path, companion) for companion in companions]
    written = [] if folder else [path, *beside]
    for place in beside:
        if place.is_symlink():
            raise OptionError(
                f'"{place}" beside --out is a link; remove it, or give another file name.'
            )
    for source in inputs:
        inside = (
            is_there(source)
            and source.is_dir()
            and any(
                is_there(place)
                and place.suffix not in OURS
                and source.resolve() in place.resolve().parents
                for place in written
            )
        )
        if inside or any(same_file(place, source) for place in written):
            what = path if inside else source
            raise OptionError(f'--out "{path}" would overwrite "{what}"; give another file name.')
    if companions and path.suffix == ".safetensors":
        raise OptionError(
            f'--out "{path}" is JSON, and its companion the safetensors file beside it; give a '
            "name that ends in .json."
        )
    nearest = path if folder else path.parent
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OptionError(f'--out "{path}" lies below "{nearest}", which is a file.')
    # A file is made and gone: permissions and read-only systems show in no other way.
    longest = max((place.name for place in (path, *beside)), key=len)
    with tempfile.NamedTemporaryFile(dir=nearest, prefix=f".{longest}."):
        pass
