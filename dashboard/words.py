"""Labels, units, help texts and sentences. Percent exists only here."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from core.errors import LimberError
from core.records import (
    ArmDifference,
    DiagnosisHeader,
    Finding,
    IntensityRange,
    MetricValue,
    ModelOutline,
    Preprocessing,
    Ratio,
    ReinitPlan,
    Remark,
)
from core.records.outline import stored_number
from core.text import json_text, printable

if TYPE_CHECKING:
    from core.catalogue.metrics import MetricInfo
    from core.judge import JudgeRule

NO_VALUE = "\N{EN DASH}"

# What comes from names of files, classes, layers and plans goes through here or `escape`.
clean = printable
# JSON or Python for a block of code; line breaks stay.
code = json_text
# How addresses, mail addresses and Streamlit's icons begin, as they stand in escaped markdown.
BEGINNINGS = re.compile(r"\\:(?=//|material|streamlit)|www(?=\.)|@", re.IGNORECASE)
APART = "\u2060"

NO_DOWNLOAD = "Ready, no download"

OPENING = "Opening it in a process of its own, within limits"

FAMILIES = {
    "gradient": "Gradients",
    "activation": "Activations",
    "weight": "Weights",
    "transfer": "Transfer",
}

# The rows a person sees first: the three families, the least of each that says something.
MAIN_METRICS = (
    "grad_l2",
    "relative_grad_norm",
    "saturated_fraction",
    "dead_fraction",
    "dormant_fraction",
    "weight_l2",
    "effective_rank",
)

METRIC_CHOICES = {"main": "Main", **FAMILIES, "all": "All"}

VIEWS: dict[Literal["value", "twin", "ratio"], str] = {
    "value": "Value",
    "twin": "Fresh twin",
    "ratio": "Ratio to twin",
}

# In the colours of ratios, a share below this counts as this.
LEAST_SHARE = 0.01

VIEW_HELP = (
    "**Value**: what was measured. **Fresh twin**: the same architecture with its own random "
    "initialisation, on the same images. **Ratio**: value over twin; 1 means no different from "
    "a network that has learnt nothing yet. Colours of ratios take shares below 1 % for 1 %. A "
    "dot: measured, but there is no ratio, mostly because the fresh twin's value is 0; the tooltip "
    "says why."
)

# The mark of a cell whose twin is 0, in the heatmap's legend.
NO_RATIO = "no ratio: the fresh twin is 0"
NO_RATIO_MORE = "no ratio: the fresh twin is 0, has none, or differs in sign"

NO_RATIO_HELP = (
    "Figures that the layer has and whose ratio it lacks: the fresh twin's is 0. Zero-initialised "
    "norms do that, which close a residual branch until training opens it."
)

RATIO_WORDS: dict[str, str] = {
    "both-zero": "the same",
    "twin-zero": "the fresh twin's value is 0: no ratio",
    "signs": "the fresh twin's value has the other sign: no ratio",
    "no-twin": "the fresh twin has no value: no ratio",
    "missing": "",
}

FADE_HELP = (
    "Cells are faded where the 95 % interval of the ratio, from the spread between batches, "
    "contains 1: so few images cannot tell the layer from a fresh one. More images, or smaller "
    "batches of as many, narrow the interval."
)

DTYPE_HELP = (
    "float32 is exact. bfloat16 and float16 run the passes under autocast, as many train: "
    "figures then are those of the rounded network. Gradients of float16 are scaled up on the way "
    "and down again before they are read."
)

TRANSFER_HELP = (
    "One more forward pass keeps each layer's features, averaged over positions, of up to 512 "
    "images: accuracy of a linear probe, LogME, and CKA against the fresh twin."
)

PRESET_HELP = "Whose rules and limits make the findings. Nothing is measured again."

KINDS = {"conv": "Convolutions", "linear": "Linear", "norm": "Norms", "other": "Other"}

RUN_TITLES = {
    "measure": "Measuring",
    "finetune": "Fine-tuning",
    "apply": "Writing weights",
    "plan": "Making the plan",
    "preview": "Looking ahead",
}
COMPANION_HELP = (
    "The bit masks that say which single weights or units are meant. Keep it beside plan.json: "
    "the two name each other by SHA-256."
)
SCRIPT_HELP = (
    "Loads the edited weights, freezes what the plan freezes and checks every bit. Needs torch and "
    "safetensors alone; put it beside plan.json and reinit.safetensors."
)
RULE_HELP = (
    "A published way to choose what is reset. It looks at the weights, at your images, or at the "
    "last measurement, and gives you a plan to look at before anything is changed."
)
KL_HELP = (
    "Mean divergence KL(before || after) of the network's answers, in nats (with the natural "
    "logarithm; 1 nat is 1.44 bits), with the untouched head: 0 is no change, far below 0.01 is "
    "nearly a no-op, above 1 the answers are others. Use a gentler scheme or a smaller share where "
    "it is larger than you want."
)
AGREEMENT_HELP = (
    "Share of the images that get the same answer with and without the plan, with the untouched "
    "head and each batch's own statistics."
)
HEAD_HELP = (
    "With the untouched head. A new head knows nothing yet, so that both are near chance: the "
    "divergence then says more."
)
CHANGE_HELP = (
    "Size of the difference over the size before, ||dW|| / ||W||, over the layer's parameters: "
    "1.4 is a fresh draw of the same size, 10 drowns what was there."
)
RULE_FIELDS = {
    "percent": "Share (%)",
    "threshold": "Limit",
    "blocks": "Blocks",
    "metric": "Figure",
    "side": "Which side",
    "of": "Of",
    "utility": "Utility",
}
RULE_WORDS = {
    "above": "above the limit",
    "below": "below the limit",
    "value": "the value",
    "ratio": "the ratio to the fresh twin",
    "gradient": "|weight x gradient|",
    "magnitude": "|weight|",
    "random": "drawn at random",
}

RUN_STATES = {
    "queued": "waiting",
    "running": "running",
    "stopping": "stopping",
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
}

DEVICE_HELP = "auto takes a GPU when there is one."

SAMPLES_HELP = (
    "How many training images are looked at, drawn with the seed and balanced over the classes. "
    "More give steadier figures and take longer in proportion."
)

BATCH_HELP = (
    "Images in one pass. Intervals come from the spread between batches, so a smaller batch, of "
    "which there are more, makes them steadier; a larger one needs more memory."
)

SIZE_HELP = (
    "Side of the square the network sees, in pixels. Smaller is faster in proportion to the "
    "area; the first number is chosen to keep a run on a CPU short."
)

SEED_HELP = "Which images are drawn, and the values of the new head and of the fresh twin."

SEEDS_HELP = (
    "One run of every arm for each. A seed fixes the new head and the order of batches, the "
    "same for all arms, so that they can be compared in pairs. Three or more give an interval."
)

LR_HELP = (
    "Highest learning rate. A baseline that learns slowly makes any disturbance look like a "
    "speed-up: compare at a rate at which the untouched network learns well. The new head learns "
    "at 0.001 at least."
)


def finding(found: Finding) -> str:
    """Return a finding with the first of its layers by name."""
    return f"{found.sentence}{_first_layers(found.layers)}"


def _first_layers(layers: Sequence[str]) -> str:
    more = f" and {len(layers) - 2} more" if len(layers) > 2 else ""
    return f" ({', '.join(layers[:2])}{more})" if layers else ""


def not_there(reason: str) -> str:
    """Return why a figure is missing: it was not asked for, or means nothing there."""
    return reason if reason.startswith("not measured") else f"not applicable: {reason}"


CONTROL_HELP = (
    "Also resets as much drawn at random: as many weights or units of the same layers, or as many "
    "layers of the same kinds and near in size. If that does as well as your plan, your plan was "
    "not the reason."
)

EVAL_HELP = "Steps between two looks at the validation images."

SCHEME_HELP = "Where the new values of the picked layers come from."

PLAN_NAME_HELP = "The name of this plan's arm in curves and files."

GLOB_HELP = (
    "Names take `*` and `?`: `blocks.5*` is all of that stage, `*.conv_pw` every pointwise "
    "convolution. Switch to regular expressions, or to types such as `Conv2d`."
)

FREEZE_HELP = (
    "Frozen layers keep their values during fine-tuning. A layer is reset or frozen, not both: it "
    "would stay random."
)

BAND_NOTE = (
    "Lines are means over seeds, bands reach from the lowest to the highest seed; loss is "
    "smoothed over a few steps."
)

DIFFERENCES = {
    "final_val_accuracy": "Final accuracy",
    "mean_val_accuracy": "Mean accuracy",
    "loss_gain": "Loss gain",
}

DIFFERENCE_HELP = {
    "final_val_accuracy": "Arm minus control at the last evaluation, paired by seed, in "
    "percentage points, with its 95 % interval.",
    "mean_val_accuracy": "Arm minus control, mean over all evaluations: faster learning shows "
    "here. In percentage points, with its 95 % interval.",
    "loss_gain": "Control's training loss minus the arm's, mean over steps, in nats (cross-entropy "
    "with the natural logarithm): positive is better. With its 95 % interval.",
}

PAGE_WAYS = {
    "Give --data or --diagnosis": "Measure the network first",
    "Give --diagnosis or --data": "Measure the network first",
    "make the plan with --data or --diagnosis, which stores its factors": "take it with a rule",
    "give the file with --checkpoint": "give the file under Your checkpoint",
    "use --weights none": "switch on Random weights",
    "give more with --memory-mb": "start Limber with a higher LIMBER_INSPECT_MB",
    "If it is sound, give more with --seconds": "Give a smaller file, or a path to part of it",
    "Use --device auto or cpu": "Take auto or cpu as the device",
    "with python -m core list models": "in the search field",
    "See python -m core list models": "See the search field",
    "Then start again, or choose another place with --out.": "Then start again.",
    " Choose another place with --out.": "",
}

SYNTAXES = {"glob": "Names with *", "regex": "Regular expression", "type": "Layer type"}


def sentence(error: LimberError) -> str:
    """Return an error's sentence with the page's own ways out in place of the command line's."""
    text = str(error)
    for option, place in PAGE_WAYS.items():
        text = text.replace(option, place)
    return text


def escape(text: str) -> str:
    """Return the text so that markdown shows it as it is: no links, no images, no emphasis.

    Addresses and icons are made out of text once markdown is through with it, where no backslash
    helps. So the letters that begin one are held apart by one that takes no room.
    """
    escaped = re.sub(r"([\\`*_{}\[\]()<>#+!|~$:^=&-])", r"\\\1", clean(text.replace("\n", " ")))
    escaped = re.sub(r"^(\s*\d+)([.)])", r"\1\\\2", escaped)
    return BEGINNINGS.sub(lambda found: f"{found[0]}{APART}", escaped)


def count(number: int, singular: str, plural: str | None = None) -> str:
    """Return "1 layer", "3 layers", "1,200 images"."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def short(number: float) -> str:
    """Return a count in three digits or so: 512, 31 k, 4.65 M."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {letter}"
    return f"{number:.0f}"


def estimate(seconds: float) -> str:
    """Return a time to expect, and what the guess rests on."""
    return f"About {duration(seconds)}, judging by the last run of this network here."


def percent(fraction: float) -> str:
    """Return a share in percent, without pretending to more digits than help."""
    if math.isnan(fraction):
        return NO_VALUE
    if 0 < fraction < 0.001:
        return "under 0.1 %"
    return f"{100 * fraction:.1f} %" if fraction < 0.1 else f"{100 * fraction:.0f} %"


def duration(seconds: float) -> str:
    """Return "4 s", "1 min 20 s", "2 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def figure(value: float | None) -> str:
    """Return a measured number in three significant digits, or a dash."""
    if value is None:
        return NO_VALUE
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    return f"{value:.2e}"


def shape(sizes: Sequence[int]) -> str:
    """Return "32 x 3 x 3 x 3"."""
    return " \N{MULTIPLICATION SIGN} ".join(str(size) for size in sizes) or "scalar"


def metric_help(info: MetricInfo) -> str:
    """Return a metric's meaning, formula, advice and source as markdown."""
    parts = [escape(info.reads), f"**Formula** `{info.formula.replace('`', '')}`"]
    if info.unit not in ("", "1"):
        parts.append(f"**Unit** {escape(info.unit)}")
    parts.append(f"**What to do** {escape(info.advice)}")
    if info.applies_to:
        parts.append(f"**Applies to** {escape(info.applies_to)}")
    parts.append(f"**Source** {escape(info.source)}")
    return "\n\n".join(parts)


def beside_twin(ratio: Ratio, twin: float | None) -> str:
    """Return how a value stands to its twin's, in words; nothing where there is no value.

    Args:
        ratio: As `LayerReport.ratio` has it.
        twin: The twin's figure, which may be too small to count beside the value without being 0.
    """
    if ratio.value is None:
        found = RATIO_WORDS[ratio.kind]
        return found.replace("is 0", "is 0 to rounding") if twin else found
    if 0.95 <= ratio.value <= 1.05:
        return "about the same"
    if ratio.value == 0:
        return ""
    larger = max(ratio.value, 1 / ratio.value)
    factor = f"{larger:.2g}" if larger < 100 else "over 100"
    return f"{factor} times" if ratio.value >= 1 else f"{factor} times less"


def dots(view: str) -> str:
    """Return what a dot in a heatmap says, in the view that has them."""
    said = "Dot: measured, but no ratio, mostly because the fresh twin's value is 0. "
    return said if view == "ratio" else ""


def remark(found: Remark) -> str:
    """Return a remark with the first of its layers by name."""
    return f"{found.sentence}{_first_layers(found.layers)}"


GaveWay = Literal["picked", "frozen", "kept"]


def gave_way(layers: Sequence[str], way: GaveWay) -> str:
    """Return what became of layers that were to be both reset and frozen."""
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    one = len(layers) == 1
    said = {
        "picked": "is reset now and no longer frozen"
        if one
        else "are reset now and no longer frozen",
        "frozen": "is frozen now and no longer reset"
        if one
        else "are frozen now and no longer reset",
        "kept": "stays unfrozen, because the plan writes into it"
        if one
        else "stay unfrozen, because the plan writes into them",
    }[way]
    return (
        f"{', '.join(layers[:3])}{more} {said}: a layer that is reset and never trains would stay "
        "random."
    )


def plan_line(layers: int, touched: int, total: int, scheme: str) -> str:
    """Return the plan in one line."""
    if not layers:
        return "No layer picked"
    return f"{count(layers, 'layer')}, {short(touched)} of {short(total)} weights, {scheme} init"


def touch_sentence(layers: int, tensors: int, touched: int, total: int) -> str:
    """Return what a pick would touch, before anything happens."""
    if not layers:
        return "Nothing is picked, so nothing would change."
    share = percent(touched / total) if total else NO_VALUE
    return (
        f"{count(layers, 'layer')} with {count(tensors, 'tensor')}: {touched:,} of {total:,} "
        f"parameters, {share} of the network."
    )


def preprocessing_sentence(preprocessing: Preprocessing) -> str:
    """Return in words what happens to an image."""
    size = preprocessing.image_size
    mean = ", ".join(f"{value:g}" for value in preprocessing.mean)
    std = ", ".join(f"{value:g}" for value in preprocessing.std)
    return (
        f"The shorter side is resized to {size} pixels ({preprocessing.interpolation}), the "
        f"centre is cropped to {size} by {size}. Values go to 0 to 1, then the mean ({mean}) is "
        f"taken off and they are divided by the deviation ({std}), channel by channel."
    )


def intensities_alt(found: IntensityRange) -> str:
    """Return what the chart of a set's intensities shows."""
    return (
        f"Bar chart of pixels over stored intensity, with {stored_number(found.low)} marked as "
        f"black and {stored_number(found.high)} as white"
    )


def head_sentence(outline: ModelOutline) -> str:
    """Return what happens to the head."""
    names = ", ".join(outline.head) or "none"
    if outline.own_head:
        return f"The head ({names}) stays as it came with the weights: {outline.classes} classes."
    if outline.pretrained_classes:
        return (
            f"The head ({names}) of {outline.pretrained_classes} classes is replaced by a new, "
            f"random one for the {outline.classes} classes of your data."
        )
    if outline.pretrained_classes == 0:
        return (
            f"The weights come without a head; a new, random one ({names}) for the "
            f"{outline.classes} classes of your data is added."
        )
    return f"A new, random head ({names}) for the {outline.classes} classes is put on."


def measured_line(header: DiagnosisHeader) -> str:
    """Return what a measurement was taken on; every figure carries its n, dtype and device."""
    return (
        f"{count(header.samples, 'image')} in {count(header.batches, 'batch', 'batches')}, "
        f"{header.image_size} px, {header.dtype} on {header.device_name or header.device}, "
        f"seed {header.seed}, {duration(header.wall_s)}"
    )


def overhead_line(header: DiagnosisHeader) -> str:
    """Return what measuring cost beside the passes it rides on; empty where it was not timed."""
    if header.overhead_fraction is None:
        return ""
    return (
        f"Reading activations and gradients took {percent(header.overhead_fraction)} on top of "
        f"the forward and backward passes ({header.kernels} sums)"
    )


def plus_minus(figure_: MetricValue) -> str:
    """Return half of a figure's 95 % interval, or nothing."""
    return "" if figure_.half_width is None else f"\N{PLUS-MINUS SIGN} {figure(figure_.half_width)}"


def at_most(figure_: MetricValue) -> str:
    """Return the largest value that a figure could have had, or nothing."""
    return "" if figure_.cap is None else f"of at most {figure(figure_.cap)}"


def ratio_range(interval: tuple[float, float] | None) -> str:
    """Return a ratio's 95 % interval in words, or nothing."""
    if interval is None:
        return ""
    low, high = interval
    if high > 1e3 * max(low, 1e-30):
        return "unknown"
    return f"{figure(low)} to {figure(high)}"


def rule_title(rule: JudgeRule) -> str:
    """Return a rule's name and the side of its limit on which it speaks."""
    side = "above" if rule.compare.endswith("above") else "below"
    of = "ratio " if rule.compare.startswith("ratio") else ""
    return f"{rule.name.replace('-', ' ').capitalize()}, {of}{side}"


def rule_help(rule: JudgeRule) -> str:
    """Return what a rule says and where it comes from, as markdown."""
    says = rule.says.format(threshold=rule.threshold, percent=100 * rule.threshold)
    return f"Layers that {escape(says)}.\n\n**Source** {escape(rule.source)}"


def plan_words(plan: ReinitPlan, title: str, touched: int, total: int) -> str:
    """Return a plan as plain sentences."""
    schemes = sorted({target.scheme.name for target in plan.targets})
    seeds = sorted({target.seed for target in plan.targets})
    share = percent(touched / total) if total else NO_VALUE
    buffers = sum(len(target.buffers) for target in plan.targets)
    lines = [
        f"Take {title} for {count(plan.model.classes, 'class', 'classes')} "
        f"({plan.model.weights} weights, state {plan.model.backbone_sha256[:12]}).",
        f"Reset {_what_of(plan)}, {touched:,} of {total:,} parameters ({share}), to new values by "
        f"the scheme {', '.join(schemes) or NO_VALUE} with seed "
        f"{', '.join(map(str, seeds)) or NO_VALUE}.",
    ]
    if buffers:
        lines.append(
            f"{count(buffers, 'buffer')} (running statistics that described the old weights) "
            "go along."
        )
    if plan.freeze:
        lines.append(f"Keep {count(len(plan.freeze), 'layer')} frozen while training.")
    if plan.untrained:
        lines.append(
            f"{count(len(plan.untrained), 'layer')} ({plan.untrained[0]} first) "
            f"{'is' if len(plan.untrained) == 1 else 'are'} reset and yet not trained, and will "
            "stay as the reset leaves them."
        )
    return " ".join(lines)


def chosen(plan: ReinitPlan) -> str:
    """Return what a plan resets, such as "12 units with all that belongs to them, in 3 layers"."""
    return _what_of(plan)


def nats(value: float | None) -> str:
    """Return a divergence with its unit."""
    return NO_VALUE if value is None else f"{value:.3g} nats"


def share(value: float | None) -> str:
    """Return a share in percent, or the sign for none."""
    return NO_VALUE if value is None else percent(value)


def _what_of(plan: ReinitPlan) -> str:
    layers = count(len(plan.targets), "layer")
    kinds = {target.granularity for target in plan.targets}
    if kinds == {"unit"}:
        units = sum(len(target.units) for target in plan.targets)
        return f"{count(units, 'unit')} with all that belongs to them, in {layers}"
    return f"single weights in {layers}" if kinds == {"weight"} else layers


def progress_line(
    kind: str,
    phase: str,
    done: int,
    total: int,
    unit: str,
    eta_s: float | None,
    queue_place: int,
    state: str,
) -> str:
    """Return what a live run does now, with the time left where it is known."""
    if state == "queued":
        if phase:
            # What the machine has no room for at the moment.
            return phase
        return (
            f"Waiting for {count(queue_place, 'run')} before this one"
            if queue_place
            else ("Starting")
        )
    if state == "stopping":
        return "Stopping"
    parts = [phase[:1].upper() + phase[1:] if phase else RUN_TITLES.get(kind, kind)]
    if total:
        parts.append(f"{done:,} of {total:,} {unit}".rstrip())
    if eta_s is not None and total:
        parts.append(f"about {duration(eta_s)} left")
    return ", ".join(parts)


def difference(found: ArmDifference) -> str:
    """Return a difference with its interval: "+1.2 (-0.4 to +2.8)"."""
    scale, digits = (1.0, 3) if found.measure == "loss_gain" else (100.0, 1)

    def signed(value: float) -> str:
        return f"{scale * value:+.{digits}f}"

    if found.low is None or found.high is None:
        return signed(found.mean)
    return f"{signed(found.mean)} ({signed(found.low)} to {signed(found.high)})"
