"""Labels, units, help texts and sentences. Percent exists only here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from core.catalogue.rules import rule_option_names
from core.errors import LimberError, Remedy
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
from core.trial.telling import bound_words

if TYPE_CHECKING:
    from core.catalogue.attributions import MethodInfo
    from core.catalogue.checks import Check
    from core.catalogue.metrics import MetricInfo

NO_VALUE = "\N{EN DASH}"

# Names of files, classes, layers and plans pass through this or `escape` before they are shown.
clean = printable
# JSON or Python for a block of code; line breaks stay.
code = json_text
# How web addresses, mail addresses and Streamlit's icons begin in escaped markdown.
BEGINNINGS = re.compile(r"\\:(?=//|material|streamlit)|www(?=\.)|@", re.IGNORECASE)
APART = "\u2060"

NO_DOWNLOAD = "Ready, no download"

OPENING = "Opening it in a separate process, within limits"

FAMILIES = {
    "gradient": "Gradients",
    "activation": "Activations",
    "weight": "Weights",
    "transfer": "Transfer",
}

# The rows that a person sees first: the fewest of each family that still say something.
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

# For the colour of a ratio, a share below this counts as this.
LEAST_SHARE = 0.01

VIEW_HELP = (
    "**Value**: what was measured. **Fresh twin**: the same architecture with its own random "
    "initialisation, on the same images. **Ratio**: value over twin; 1 means no different from a "
    "network that has learnt nothing yet. For its colour, a share below 1 % counts as 1 %. A "
    "dot marks a figure that has no ratio, mostly because the fresh twin's value is 0; the "
    "tooltip says why."
)

# The mark of a cell whose twin is 0, in the heatmap's legend.
NO_RATIO = "no ratio: the fresh twin is 0"
NO_RATIO_MORE = "no ratio: the fresh twin is 0, has none, or differs in sign"

NO_RATIO_HELP = (
    "Figures of the layer that have no ratio, because the fresh twin's value is 0. "
    "Zero-initialised norms cause this: they close a residual branch until training opens it."
)

RATIO_WORDS: dict[str, str] = {
    "both-zero": "the same",
    "twin-zero": "the fresh twin's value is 0: no ratio",
    "signs": "the fresh twin's value has the other sign: no ratio",
    "no-twin": "the fresh twin has no value: no ratio",
    "missing": "",
}

FADE_HELP = (
    "A cell is faded where the 95 % interval of its ratio contains 1: with so few images the "
    "layer cannot be told from the fresh twin's. The interval comes from the spread between "
    "batches. More images narrow it, and so do smaller batches of the same images."
)

DTYPE_HELP = (
    "float32 is exact. bfloat16 and float16 run the passes under autocast, as many people train: "
    "the figures are then those of the rounded network. float16 gradients are scaled up on the "
    "way and scaled back before they are read."
)

TRANSFER_HELP = (
    "One more forward pass keeps each layer's features, averaged over positions, for up to 512 "
    "images. It gives the accuracy of a linear probe, LogME, and CKA against the fresh twin."
)

PRESET_HELP = "Which checks and limits make the findings. Nothing is measured again."

RUN_TITLES = {
    "measure": "Measuring",
    "finetune": "Fine-tuning",
    "apply": "Writing weights",
    "plan": "Making the plan",
    "preview": "Looking ahead",
    "after": "Measuring after the fine-tune",
    "attribute": "Looking what a layer carries",
    "estimate": "Timing a few steps",
}
COMPANION_HELP = (
    "Bit masks of the single weights or units that the plan resets. Keep this file next to "
    "plan.json: each names the other by its SHA-256."
)
SCRIPT_HELP = (
    "Loads the edited weights, freezes what the plan freezes and checks every bit. It needs only "
    "torch and safetensors. Put it next to plan.json and reinit.safetensors."
)
RULE_HELP = (
    "A published way to choose what is reset. It looks at the weights, at your images, or at the "
    "last measurement, and makes a plan that you can look at before anything changes."
)
KL_HELP = (
    "Mean divergence KL(before || after) of the network's outputs, in nats (natural "
    "logarithm; 1 nat is 1.44 bits), with the head as it was. 0 is no change, far below 0.01 is "
    "nearly a no-op, above 1 most predictions have changed. If it is larger than you want, use a "
    "gentler scheme or a smaller share."
)
AGREEMENT_HELP = (
    "Share of the images with the same prediction with and without the plan. The head is as it "
    "was, and each batch uses its own statistics."
)
HEAD_HELP = (
    "With the head as it was. A new head knows nothing yet, so both accuracies are near chance; "
    "the divergence then says more."
)
CHANGE_HELP = (
    "Size of the difference divided by the size before, ||dW|| / ||W||, over the layer's "
    "parameters: 1.4 is a fresh draw of the same size, 10 drowns what was there."
)

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
    "How many training images to measure. They are drawn with the seed and balanced over the "
    "classes. More images give steadier figures and take proportionally longer."
)

BATCH_HELP = (
    "Images in one pass. Empty: 32, or fewer so that there are four batches. Intervals come from "
    "the spread between batches: with one batch there are none, smaller batches are more numerous "
    "and make them steadier, larger ones need more memory."
)

SIZE_HELP = (
    "Side of the square that the network sees, in pixels. Time grows with the area; the default "
    "keeps a run on a CPU short."
)

SEED_HELP = "Decides which images are drawn, and the values of the new head and of the fresh twin."

SEEDS_HELP = (
    "Every arm runs once for each seed. A seed fixes the new head, the order of the batches and "
    "the augmentation of every image, the same for all arms, so that they can be compared in pairs."
)
QUICK_SEEDS_HELP = SEEDS_HELP + (
    " Up to seven seeds are a screening: an estimate with its interval, and nothing is claimed."
)
VERDICT_SEEDS_HELP = SEEDS_HELP + (
    " A claim takes eight or more: with fewer, no pattern of signs of the differences is rare "
    "enough (2 of 256 at eight seeds, 2 of 8 at three)."
)
OUTCOME_HELP = (
    "What the verdict is about. It is named before the run, so that nobody can pick the best of "
    "several afterwards; the other figures are shown as description."
)
MARGIN_HELP = (
    "A difference that would not matter to you, in points of accuracy (of steps to target in "
    "percent). Where the whole interval lies inside it, the arms are equivalent. 0 leaves no "
    "difference that is too small."
)
SWEEP_HELP = (
    "First trains the untouched network at five learning rates, and takes its best one for all "
    "arms. Where a rate is too low for the untouched network, any reset looks like a gain."
)
RIVALS_HELP = (
    "Each trains the network in another way, without your plan. A reset that gains no more than "
    "these has shown nothing."
)
MORE_PLANS_HELP = "Plans that earlier runs of this network used or made: an arm each."
OPTIMIZER_HELP = "Any optimiser of timm by its name: adamw, sgd, lion, lamb, muon and others."
SCHEDULE_HELP = "How the learning rate falls after a warm-up of five steps, by timm's names."
AUGMENT_HELP = (
    "What is done to training images, drawn anew for every image and step, the same for all arms. "
    "Leave out what would change the class: flips of digits, letters or sided anatomy."
)
FOREST_HELP = (
    "A row is one comparison: the difference over paired seeds with its 95 % interval. The "
    "intervals hold for all rows at once (sign flips over all rows, max-T). The band is the "
    "margin: an interval inside it means equivalent. An interval that leaves out 0 is a claim, "
    "once all seeds are done and there are eight or more."
)
TRIAL_WORDS = {
    "Screening": "A trial of up to seven seeds. It shows estimates with intervals and claims "
    "nothing: with so few seeds no pattern of signs is rare enough.",
    "Better, worse": "With all planned seeds, eight at least, the 95 % interval leaves out no "
    "difference, jointly over all comparisons: in at most 5 % of trials without any difference is "
    "there any such claim. Sign flips of whole seeds, max-T (Westfall and Young 1993).",
    "Equivalent": "The whole interval lies inside the margin: whatever difference there is does "
    "not matter to you.",
    "Inconclusive": "The interval holds no difference as well as differences beyond the margin. "
    "More seeds, or more steps, may tell.",
    "No verdict": "The training is too weak to judge by: near chance, the untouched network below "
    "its own linear probe, a rising loss, or a best learning rate at the edge of its sweep.",
    "Linear probe": "What a linear head on the untouched network's features reaches on the same "
    "images (ridge regression, penalty by cross-validation). Training all of the network should "
    "reach at least that.",
    "Resolvable difference": "1.96 standard errors, over validation images, of the difference "
    "between two arms' answers (averaged over seeds). A smaller difference may be luck of these "
    "images; more seeds do not help, more images do.",
    "Joint p value": "The share of sign patterns in which the largest studentised mean of all "
    "comparisons is at least as large as this one's.",
}
RESOLVABLE_HELP = (
    "The share of validation images that exactly one of the two arms has right, and the difference "
    "below which luck of these images could be the reason: 1.96 standard errors over images. More "
    "images lower it; more seeds do not."
)

LR_HELP = (
    "Highest learning rate. A baseline that learns slowly makes any disturbance look like a "
    "speed-up, so compare at a rate at which the untouched network learns well. The new head "
    "learns at 0.003 or more."
)


def finding_line(finding: Finding) -> str:
    """Return a finding's sentence with the names of its first layers."""
    return f"{finding.sentence}{_first_layers(finding.layers)}"


def _first_layers(layers: Sequence[str]) -> str:
    more = f" and {len(layers) - 2} more" if len(layers) > 2 else ""
    return f" ({', '.join(layers[:2])}{more})" if layers else ""


def not_there(reason: str) -> str:
    """Return why a figure is missing: it was not asked for, or means nothing there."""
    return reason if reason.startswith("not measured") else f"not applicable: {reason}"


KEEP_WEIGHTS_HELP = (
    "Of the first seed, as safetensors in the run's folder. An open layer then shows whether its "
    "stiffness went, and what it carries after training."
)

RANDOM_CONTROL_HELP = (
    "Also resets as much, drawn at random: as many weights or units in the same layers, or as "
    "many layers of the same kinds and of similar size. If that does as well as your plan, your "
    "plan was not the reason."
)

EVAL_HELP = "Steps between two evaluations on the validation images."

SCHEME_HELP = "Where the new values of the picked layers come from."

PLAN_NAME_HELP = "The name of this plan's arm in curves and files."

GLOB_HELP = (
    "Names may contain `*` and `?`: `blocks.5*` matches that whole stage, `*.conv_pw` every "
    "pointwise convolution. You can also switch to regular expressions, or to types such as "
    "`Conv2d`."
)

FREEZE_HELP = (
    "Frozen layers keep their values during fine-tuning. A layer is reset or frozen, never both: "
    "it would stay random."
)

BAND_NOTE = (
    "Lines are means over seeds; bands reach from the lowest to the highest seed. Loss is "
    "smoothed over a few steps."
)

DIFFERENCES = {
    "final_val_accuracy": "Final accuracy",
    "mean_val_accuracy": "Accuracy over the run",
    "steps_to_target": "Speed to target",
    "loss_gain": "Loss gain",
}

DIFFERENCE_HELP = {
    "final_val_accuracy": "This arm minus the untouched one at the last evaluation, paired by "
    "seed. In percentage points, with its 95 % interval.",
    "mean_val_accuracy": "This arm minus the untouched one, mean over all evaluations: faster "
    "learning shows here. In percentage points, with its 95 % interval.",
    "steps_to_target": "Steps of the untouched arm to its final accuracy (mean over the other "
    "seeds) over this arm's: above 1 is faster. Geometric mean over seeds, with its 95 % interval.",
    "loss_gain": "Training loss of the untouched arm minus this arm's, mean over steps: positive "
    "is better. In nats (cross-entropy with the natural logarithm), with its 95 % interval.",
}

# What the pages say can be done about an error, with their own labels in quotes. `{field}` is the
# label of a rule's option.
WAYS: Mapping[Remedy, str] = {
    Remedy.GIVE_IMAGES: 'Measure the network first, on the page "Look".',
    Remedy.PLAN_WITH_IMAGES: (
        'Take it under "Choose by a published rule" and press "Make the plan": that looks at your '
        "images."
    ),
    Remedy.CONNECT: (
        'Connect once, give the file under "Your checkpoint", switch on "Random weights", or take '
        'a network under "Embedded".'
    ),
    Remedy.OTHER_WEIGHTS: (
        'Switch on "Random weights", choose another "Name", or give the file under '
        '"Your checkpoint".'
    ),
    Remedy.OTHER_PLACE: "Start Limber with another folder in LIMBER_HOME.",
    Remedy.START_AGAIN: "Then start again.",
    Remedy.OTHER_DEVICE: 'Take auto or cpu as the "Device".',
    Remedy.MORE_MEMORY: "If it is sound, start Limber with a higher LIMBER_INSPECT_MB.",
    Remedy.MORE_TIME: "Give a smaller file, or a path to part of it.",
    Remedy.LIST_MODELS: 'Search for it under "timm, torchvision", in the field "Name".',
    Remedy.LIST_DATA_SETS: 'Take a set under "Embedded", or give a path under "Folder, zip".',
    Remedy.LIST_METRICS: 'Choose another in the field "Figure".',
    Remedy.LIST_RULES: 'Choose one in the field "Rule".',
    Remedy.LIST_SCHEMES: 'Choose one in the field "Scheme".',
    Remedy.LIST_LAYERS: 'See the names in the field "Layer".',
    Remedy.OTHER_METHOD: 'Choose another "Method".',
    Remedy.OTHER_LAYER: "Open another layer.",
    Remedy.LOOK_INSIDE: 'Press "Measure again".',
    Remedy.LAYERS_OR_UNITS: (
        'Pick whole layers in the table under "Your plan", or units by a rule under "Choose by a '
        'published rule".'
    ),
    Remedy.GIVE_OPTION: 'Fill in the field "{field}".',
    Remedy.OTHER_OPTION: 'Change the field "{field}".',
    Remedy.NO_OPTION: 'Choose another rule in the field "Rule".',
    Remedy.FOLDER_OF_SET: 'Fill in "Folder that holds it" under "torchvision".',
}

SYNTAXES = {"glob": "Names with *", "regex": "Regular expression", "type": "Layer type"}


def sentence(error: LimberError) -> str:
    """Return what happened and what to do about it on these pages."""
    if error.remedy is None:
        return error.fact
    option = error.values.get("option")
    known = rule_option_names()
    label = known[option].label if option in known else option
    fields = {} if option is None else {"field": label}
    try:
        return f"{error.fact} {WAYS[error.remedy].format(**fields)}"
    except KeyError:
        # A worker of another version told it, and left out the option.
        return error.fact


def escape(text: str) -> str:
    """Return the text so that markdown shows it as it is: no links, no images, no emphasis.

    Streamlit makes links and icons out of the text after the markdown is parsed, where no
    backslash helps. So a character without width splits the letters that begin one.
    """
    escaped = re.sub(r"([\\`*_{}\[\]()<>#+!|~$:^=&-])", r"\\\1", clean(text.replace("\n", " ")))
    escaped = re.sub(r"^(\s*\d+)([.)])", r"\1\\\2", escaped)
    return BEGINNINGS.sub(lambda beginning: f"{beginning[0]}{APART}", escaped)


def count(number: int, singular: str, plural: str | None = None) -> str:
    """Return "1 layer", "3 layers", "1,200 images"."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def short(number: float) -> str:
    """Return a count with about three digits: 512, 31 k, 4.65 M."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {letter}"
    return f"{number:.0f}"


def estimate(seconds: float) -> str:
    """Return how long a run will take, and what the guess is based on."""
    return f"About {duration(seconds)}, judging by the last run of this network here."


def trial_estimate(quick: tuple[int, float], verdict: tuple[int, float]) -> str:
    """Return how long both kinds of trial take: pairs of seeds and seconds."""
    return (
        f"Quick look with {quick[0]} seeds: about {roughly(quick[1])}. Verdict with {verdict[0]} "
        f"seeds: about {roughly(verdict[1])}. Judging by a two-second probe on this machine."
    )


def roughly(seconds: float) -> str:
    """Return a guessed duration without digits that nobody can know: "40 s", "3 min", "1.5 h"."""
    if seconds < 55:
        return f"{max(5, 5 * round(seconds / 5))} s"
    if seconds < 55 * 60:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:.1f} h"


def percent(fraction: float) -> str:
    """Return a share in percent, with no more digits than help."""
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


def method_help(method: MethodInfo) -> str:
    """Return what an attribution method says, compares with and rests on, as markdown."""
    parts = [escape(method.reads), f"**Formula** `{method.formula.replace('`', '')}`"]
    if method.baseline:
        parts.append(f"**Baseline** {escape(method.baseline)}")
    parts.append(f"**Applies to** {escape(method.applies_to)}")
    parts.append(f"**Source** {escape(method.source)} ({escape(method.captum)} of Captum)")
    return "\n\n".join(parts)


def meaning(info: MetricInfo) -> str:
    """Return in half a sentence what a metric says, and which way worries."""
    says = re.split(r"(?<=[.:;]) ", info.reads, maxsplit=1)[0].rstrip(".:;")
    worries = {"high": " High is stiff.", "low": " Low is stiff."}.get(info.bad or "", "")
    return f"{says}.{worries}"


def against_twin(ratio: Ratio, twin: float | None) -> str:
    """Return how a value compares with its twin's, in words; empty where there is no value.

    Args:
        ratio: As `LayerReport.ratio` returns it.
        twin: The twin's figure. It may be too small to count against the value without being 0.
    """
    if ratio.value is None:
        why = RATIO_WORDS[ratio.kind]
        return why.replace("is 0", "is 0 to rounding") if twin else why
    if 0.95 <= ratio.value <= 1.05:
        return "about the same"
    if ratio.value == 0:
        return ""
    larger = max(ratio.value, 1 / ratio.value)
    factor = f"{larger:.2g}" if larger < 100 else "over 100"
    return f"{factor} times" if ratio.value >= 1 else f"{factor} times less"


def dots(view: str) -> str:
    """Return the legend of a heatmap's dots; empty in the views that have none."""
    legend = (
        "Dot: measured, but no ratio, mostly because the fresh twin's value is 0; the larger the "
        "figure, the larger the dot. "
    )
    return legend if view == "ratio" else ""


def remark_line(remark: Remark) -> str:
    """Return a remark's sentence with the names of its first layers."""
    return f"{remark.sentence}{_first_layers(remark.layers)}"


GaveWay = Literal["picked", "frozen", "kept"]


def gave_way(layers: Sequence[str], way: GaveWay) -> str:
    """Return what became of layers that were asked to be both reset and frozen."""
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


def plan_line(layers: int, touched: int, total: int) -> str:
    """Return what a plan resets, in one line."""
    if not layers:
        return "No layer picked"
    share = f" ({percent(touched / total)})" if total else ""
    return f"{count(layers, 'layer')}, {short(touched)} of {short(total)} weights{share}"


def plan_how(scheme: str, rule: str | None, frozen: int) -> str:
    """Return how a plan came about and where its new values come from."""
    by = "Picked by hand" if rule is None else f"By the rule {rule}"
    kept = f", {count(frozen, 'layer')} frozen" if frozen else ""
    return f"{by}, new values: {scheme}{kept}"


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
        f"The shorter side is resized to {size} pixels ({preprocessing.interpolation}) and the "
        f"centre is cropped to {size} by {size}. Values are scaled to 0-1, then standardised per "
        f"channel with mean ({mean}) and standard deviation ({std})."
    )


def intensities_alt(intensities: IntensityRange) -> str:
    """Return what the chart of a set's intensities shows."""
    return (
        f"Bar chart of pixels over stored intensity, with {stored_number(intensities.low)} marked "
        f"as black and {stored_number(intensities.high)} as white"
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
    return f"A new, random head ({names}) for the {outline.classes} classes is added."


def measured_line(header: DiagnosisHeader) -> str:
    """Return what a measurement was taken on; every figure carries its n, dtype and device."""
    return (
        f"{count(header.samples, 'image')} in {count(header.batches, 'batch', 'batches')}, "
        f"{header.image_size} px, {header.dtype} on {header.device_name or header.device}, "
        f"seed {header.seed}, {duration(header.wall_s)}"
    )


def overhead_line(header: DiagnosisHeader) -> str:
    """Return what measuring cost on top of the passes; empty where it was not timed."""
    if header.overhead_fraction is None:
        return ""
    return (
        f"Reading activations and gradients took {percent(header.overhead_fraction)} on top of "
        f"the forward and backward passes ({header.kernels} sums)"
    )


def plus_minus(measured: MetricValue) -> str:
    """Return half of a figure's 95 % interval, or nothing."""
    return (
        "" if measured.half_width is None else f"\N{PLUS-MINUS SIGN} {figure(measured.half_width)}"
    )


def at_most(measured: MetricValue) -> str:
    """Return the largest value that a figure could have had, or nothing."""
    return "" if measured.cap is None else f"of at most {figure(measured.cap)}"


def ratio_range(interval: tuple[float, float] | None) -> str:
    """Return a ratio's 95 % interval in words, or nothing."""
    if interval is None:
        return ""
    low, high = interval
    if high <= 1e3 * max(low, 1e-30):
        return f"{figure(low)} to {figure(high)}"
    # So wide that one end says nothing; the other may still tell the network from its twin.
    if high < 1:
        return f"under {figure(high)}"
    return f"over {figure(low)}" if low > 1 else "unknown"


def check_title(check: Check) -> str:
    """Return a check's name and the side of its limit on which it finds something."""
    side = "above" if check.compare.endswith("above") else "below"
    of = "ratio " if check.compare.startswith("ratio") else ""
    return f"{check.name.replace('-', ' ').capitalize()}, {of}{side}"


def check_help(check: Check) -> str:
    """Return what a check says and where it comes from, as markdown."""
    return f"Layers that {escape(check.predicate())}.\n\n**Source** {escape(check.source)}"


def plan_words(plan: ReinitPlan, title: str, touched: int, total: int) -> str:
    """Return a plan as plain sentences."""
    schemes = sorted({target.scheme.name for target in plan.targets})
    seeds = sorted({target.seed for target in plan.targets})
    share = percent(touched / total) if total else NO_VALUE
    # A layer and the norm after it may both name the norm's statistics.
    buffers = len({name for target in plan.targets for name in target.buffers})
    lines = [
        f"Take {title} for {count(plan.model.classes, 'class', 'classes')} "
        f"({plan.model.weights} weights, state {plan.model.backbone_sha256[:12]}).",
        f"Reset {chosen(plan)}: {touched:,} of {total:,} parameters ({share}). Draw the new "
        f"values by the scheme {', '.join(schemes) or NO_VALUE} with seed "
        f"{', '.join(map(str, seeds)) or NO_VALUE}.",
    ]
    if plan.model.head == "new":
        lines.append(
            f"The head is new, whatever came with the weights: "
            f"{count(plan.model.classes, 'class', 'classes')}, random, seed {plan.model.head_seed}."
        )
    if buffers:
        lines.append(
            f"Also reset {count(buffers, 'buffer')}: running statistics that described the old "
            "weights."
        )
    if plan.freeze:
        lines.append(f"Keep {count(len(plan.freeze), 'layer')} frozen while training.")
    if plan.untrained:
        lines.append(
            f"{count(len(plan.untrained), 'layer')} ({plan.untrained[0]} first) "
            f"{'is' if len(plan.untrained) == 1 else 'are'} reset but not trained, and will "
            f"stay as the reset leaves {'it' if len(plan.untrained) == 1 else 'them'}."
        )
    return " ".join(lines)


def nats(value: float | None) -> str:
    """Return a divergence with its unit."""
    return NO_VALUE if value is None else f"{value:.3g} nats"


def share(value: float | None) -> str:
    """Return a share in percent, or a dash."""
    return NO_VALUE if value is None else percent(value)


def chosen(plan: ReinitPlan) -> str:
    """Return what a plan resets, such as "12 units with all that belongs to them, in 3 layers"."""
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
    """Return what a live run is doing, with the time left where it is known."""
    if state == "queued":
        if phase:
            # It says what the machine has no room for at the moment.
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


def difference_line(difference: ArmDifference) -> str:
    """Return a difference with its interval: "+1.2 (-0.4 to +2.8)"."""
    if difference.measure == "steps_to_target":
        numbers = (difference.mean, difference.low, difference.high)
        mean, low, high = ("?" if number is None else f"{number:.2f}" for number in numbers)
        bound = bound_words(difference)
        return f"{bound}{mean}" + ("" if difference.low is None else f" ({low} to {high})")
    scale, digits = (1.0, 3) if difference.measure == "loss_gain" else (100.0, 1)

    def signed(value: float) -> str:
        return f"{scale * value:+.{digits}f}"

    if difference.low is None or difference.high is None:
        return signed(difference.mean)
    low, high = signed(difference.low), signed(difference.high)
    return f"{signed(difference.mean)} ({low} to {high})"
