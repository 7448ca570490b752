"""Exceptions a person can act on.

Every message says what was asked, what was found and what to do next. The command line prints
the message as one line and exits with 2; the pages show it in a box. Anything else that escapes
is a defect of ours, not of the person's input.
"""

from __future__ import annotations


class LimberError(Exception):
    """Base of everything a person can put right themselves."""


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
