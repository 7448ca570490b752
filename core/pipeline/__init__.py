"""The stages composed, no screen: what the command line and the pages both call."""

from __future__ import annotations

from core.files.diagnoses import read_diagnosis, read_units, units_with_twins, write_diagnosis
from core.pipeline.applying import (
    edited_model,
    edited_weights,
    load_edited,
    plan_classes,
    plan_outline,
    plan_spec,
    reset_weights,
)
from core.pipeline.basics import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_SAMPLES,
    Watcher,
    check_amounts,
    check_image_size,
    choose_device,
    opened_images,
    outline_model,
    read_batch,
)
from core.pipeline.measuring import diagnose
from core.pipeline.parts import measure_part, merge_parts
from core.pipeline.trial import (
    DEFAULT_EVAL_EVERY,
    DEFAULT_SEEDS,
    DEFAULT_STEPS,
    DEFAULT_TRAIN_IMAGES,
    DEFAULT_VAL_IMAGES,
    Trial,
    prepare_trial,
    step_event,
    write_run,
)

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_EVAL_EVERY",
    "DEFAULT_SAMPLES",
    "DEFAULT_SEEDS",
    "DEFAULT_STEPS",
    "DEFAULT_TRAIN_IMAGES",
    "DEFAULT_VAL_IMAGES",
    "Trial",
    "Watcher",
    "check_amounts",
    "check_image_size",
    "choose_device",
    "diagnose",
    "edited_model",
    "edited_weights",
    "load_edited",
    "measure_part",
    "merge_parts",
    "opened_images",
    "outline_model",
    "plan_classes",
    "plan_outline",
    "plan_spec",
    "prepare_trial",
    "read_batch",
    "read_diagnosis",
    "read_units",
    "reset_weights",
    "step_event",
    "units_with_twins",
    "write_diagnosis",
    "write_run",
]
