"""Exceptions a person can act on, and the remedies they name.

Every error states what was asked and what was found. What to do next stands in the same sentence
where it is the same for everybody. Where it is not, because the command line has an option for it,
the page a field and a library an argument, the error names a `Remedy`, and each face says that
remedy in its own words: the command line in one line before it exits with 2, the pages in a box.
Anything else that escapes is a defect of ours, not of the person's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Remedy(StrEnum):
    """What a person can do about an error, by a key that reads as advice.

    The words of the command line are in `core/cli/remedies.py`, those of the pages in
    `dashboard/words.py`. Some need a value of the error: `option` is a rule's option by its key,
    `kind` a torchvision set by its name.
    """

    GIVE_IMAGES = "give-images-or-diagnosis"
    PLAN_WITH_IMAGES = "make-the-plan-with-images-or-diagnosis"
    CONNECT = "connect-once-or-choose-other-weights"
    OTHER_WEIGHTS = "choose-other-weights-or-random-ones"
    OTHER_PLACE = "choose-other-place"
    START_AGAIN = "start-again-or-choose-other-place"
    OTHER_DEVICE = "choose-device-that-is-here"
    MORE_MEMORY = "allow-more-memory"
    MORE_TIME = "allow-more-time"
    LIST_MODELS = "list-models"
    LIST_DATA_SETS = "list-data-sets"
    LIST_METRICS = "list-metrics"
    LIST_RULES = "list-rules"
    LIST_SCHEMES = "list-schemes"
    LIST_LAYERS = "list-layers"
    OTHER_METHOD = "choose-another-method"
    OTHER_LAYER = "choose-another-layer"
    LOOK_INSIDE = "measure-and-look-inside"
    LAYERS_OR_UNITS = "give-layers-or-units"
    GIVE_OPTION = "give-the-option"
    OTHER_OPTION = "give-another-value-of-the-option"
    NO_OPTION = "leave-the-option-out"
    FOLDER_OF_SET = "name-the-folder-of-the-set"


class LimberError(Exception):
    """Base of everything a person can put right themselves.

    `str(error)` is the fact and nothing else: faces put their own words behind it, and a sentence
    of ours that names an option would be wrong on all faces but one. Whoever calls the library
    reads the remedy's key below the traceback, as a note, and finds it in `error.remedy`.

    Attributes:
        fact: What was asked and what was found.
        remedy: What can be done, where that differs from face to face; else None.
        values: What the remedy's words need.
    """

    def __init__(self, fact: str, remedy: Remedy | None = None, **values: str) -> None:
        super().__init__(fact)
        self.fact = fact
        self.remedy = remedy
        self.values: Mapping[str, str] = values
        if remedy is not None:
            named = "".join(f" ({name}: {value})" for name, value in values.items())
            self.add_note(f"Remedy: {remedy}{named}")


class ModelError(LimberError):
    """A model name, checkpoint or architecture that cannot be used as asked."""


class DataError(LimberError):
    """A data set, folder, archive or image that cannot be used as asked."""


class PlanError(LimberError):
    """A plan that is malformed, does not fit the model, or would do something unsafe."""


class OptionError(LimberError):
    """A number or name outside what an option allows."""


class OfflineError(LimberError):
    """Weights are not on this machine and the host that has them cannot be reached."""


class Stopped(LimberError):  # noqa: N818 - a person's wish, not a fault
    """The person asked for a stop; what was finished before it is kept."""


def told(error: LimberError, sentence: str) -> dict[str, Any]:
    """Return an error as JSON values, for another process to read with `error_told`.

    Args:
        error: What happened.
        sentence: The same in the words of the process that tells it, for whoever reads the file,
            and for versions that know no remedies.
    """
    if error.remedy is None:
        return {"message": sentence}
    return {
        "message": sentence,
        "fact": error.fact,
        "remedy": str(error.remedy),
        "values": dict(error.values),
    }


def error_told(content: Mapping[str, Any]) -> LimberError:
    """Return the error that another process told, perhaps of another version.

    One without a remedy, or with one that is not known here, keeps its teller's sentence.

    Raises:
        KeyError: There is no sentence.
    """
    sentence = str(content["message"])
    fact, values = content.get("fact"), content.get("values")
    try:
        remedy = Remedy(content["remedy"])
    except (KeyError, ValueError):
        return LimberError(sentence)
    if not isinstance(fact, str) or not isinstance(values, dict):
        return LimberError(sentence)
    error = LimberError(fact, remedy)
    error.values = {str(name): str(value) for name, value in values.items()}
    return error
