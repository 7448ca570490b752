"""The registry of metrics: what each is, how to read it, what to do about it, where it is from.

Tables, help texts and the command line's listing all come from here; a test holds it against
what a measurement really yields.
"""

from __future__ import annotations

from typing import Literal

from core.records.base import Value

NEAR_ZERO = 1e-3
NEAR_ZERO_OUTPUT = 0.05
DORMANT_TAU = 0.025
RARELY_ACTIVE = 0.01

Family = Literal["gradient", "activation", "weight", "transfer"]


class MetricInfo(Value):
    """One metric.

    Attributes:
        name: Key in a diagnosis.
        title: Plain words, the term second.
        family: What it is computed from.
        level: Whether it describes a layer or each of its units.
        formula: Plain text.
        unit: Unit, or "1" for a pure number.
        low, high: Range; None where open.
        applies_to: Which layers have it.
        reads: What it means.
        advice: What a low or high value suggests.
        bad: Which end is stiff: "high", "low", or None where neither is as such.
        scale: How to spread colours over it.
        source: Paper or "standard".
    """

    name: str
    title: str
    family: Family
    level: Literal["layer", "unit"]
    formula: str
    unit: str
    low: float | None
    high: float | None
    applies_to: str
    reads: str
    advice: str
    bad: Literal["high", "low"] | None
    scale: Literal["log", "linear"]
    source: str


def _metric(  # noqa: PLR0913 - one argument a column of the table
    name: str,
    title: str,
    family: Family,
    formula: str,
    *,
    reads: str,
    advice: str,
    bad: Literal["high", "low"] | None,
    source: str,
    applies_to: str,
    unit: str = "1",
    low: float | None = None,
    high: float | None = None,
    scale: Literal["log", "linear"] = "linear",
    level: Literal["layer", "unit"] = "layer",
) -> MetricInfo:
    return MetricInfo(
        name=name,
        title=title,
        family=family,
        level=level,
        formula=formula,
        unit=unit,
        low=low,
        high=high,
        applies_to=applies_to,
        reads=reads,
        advice=advice,
        bad=bad,
        scale=scale,
        source=source,
    )


_TRAINED = "layers whose weight takes part in training"
_FEEDS = "layers that feed an activation function"
_RECTIFIED = "layers that feed a ReLU or ReLU6"
_BOUNDED = "layers that feed a bounded activation (ReLU6, sigmoid, tanh and their hard forms)"
_FEATURES = "layers that run and hand on features of single images; asks for the slower pass"
_ASKS = "layers that make the queries of an attention"
_WEIGHTED = "all layers"
_MATRIX = "layers whose weight has two axes or more, the smaller side up to 2,048"

_GRADIENT = (
    _metric(
        "grad_l2",
        "Gradient size (L2 norm)",
        "gradient",
        "||g||_2, g = mean over samples of dL/dW",
        low=0,
        scale="log",
        bad="low",
        applies_to=_TRAINED,
        source="standard",
        unit="loss per weight unit",
        reads="How strongly the first step on your data would push this layer's weight.",
        advice="Far below the fresh twin: little of the loss reaches the layer. Try a reset of it "
        "or of the layers after it, and let the short fine-tune decide.",
    ),
    _metric(
        "grad_mean_abs",
        "Mean gradient magnitude",
        "gradient",
        "mean |g|",
        low=0,
        scale="log",
        bad="low",
        applies_to=_TRAINED,
        source="standard",
        unit="loss per weight unit",
        reads="The average push on one weight; comparable between layers of different size.",
        advice="Below 1e-7 the gradient has practically vanished in single precision (Amazon "
        "SageMaker Debugger's limit).",
    ),
    _metric(
        "relative_grad_norm",
        "Relative gradient norm",
        "gradient",
        "||g||_2 / ||W||_2",
        low=0,
        scale="log",
        bad="low",
        applies_to=_TRAINED,
        source="Lee et al., Surgical Fine-Tuning, ICLR 2023, arXiv:2210.11466",
        unit="loss",
        reads="How large the push is against the weight it has to move.",
        advice="A low value says the layer will change little in few steps, because its gradient "
        "is small or its weight is large.",
    ),
    _metric(
        "weight_grad_mean_abs",
        "Weight times gradient",
        "gradient",
        "mean |W * g|",
        low=0,
        scale="log",
        bad="low",
        applies_to=_TRAINED,
        source="Coetzer et al. 2026, arXiv:2603.20860 (utility WG); arXiv:2508.00212",
        unit="loss",
        reads="First-order estimate of how much the loss depends on each weight.",
        advice="Weights with a low product matter little for your data: the entries that utility "
        "rules pick first.",
    ),
    _metric(
        "grad_snr",
        "Gradient signal to noise",
        "gradient",
        "||mean g|| / sqrt(sum over entries of var_b g_b), batches b weighted by their images",
        low=0,
        scale="log",
        bad="low",
        applies_to=_TRAINED + "; needs two batches or more",
        source="standard",
        unit="1",
        reads="Whether batches agree on the direction; it grows with the batch size.",
        advice="A low value means that batches disagree: measure with more samples before you "
        "trust the other gradient figures.",
    ),
    _metric(
        "optimization_readiness",
        "Optimization readiness",
        "gradient",
        "||g||_2^4 / E_B ||g_B||_2^2, g_B the mean gradient of a batch",
        low=0,
        scale="log",
        bad="low",
        applies_to=_TRAINED + "; needs two batches or more",
        source="Wang et al. 2026, arXiv:2605.09044",
        unit="squared loss per squared weight unit",
        reads="Strength times reliability of the gradient: a lower bound, up to the curvature, on "
        "what one step of the best size gains. The paper divides by the smoothness constant L "
        "too; we leave it at 1, because it is not measured.",
        advice="Far below the twin: one step on this layer buys little. Use many small batches: "
        "with few, the noise is poorly known.",
    ),
    _metric(
        "grad_zero_fraction",
        "Gradient entries that are exactly 0",
        "gradient",
        "share of entries with g = 0",
        low=0,
        high=1,
        bad="high",
        applies_to=_TRAINED,
        source="AutoTrainer (Zhang et al., ICSE 2021) calls a ReLU network dying at 70 %",
        unit="share",
        reads="Share of weights that no measured image pushes at all.",
        advice="High beside the twin: look for dead units before or after the layer.",
    ),
    _metric(
        "unit_grad_mean_abs_mean",
        "Gradient at the units",
        "gradient",
        "mean over units of E|dL_n/dh_i|",
        low=0,
        scale="log",
        bad="low",
        applies_to=_FEEDS,
        source="per-unit quantity of GraMa, arXiv:2505.24061",
        unit="loss per output unit",
        reads="How strongly the loss of one sample asks the layer's outputs to change.",
        advice="Far below the twin: what the layer computes hardly matters to the loss.",
    ),
    _metric(
        "grad_dormant_fraction",
        "Units that get hardly any gradient (tau = 0.025)",
        "gradient",
        "share of units with E|dL/dh_i| <= tau * layer mean",
        low=0,
        high=1,
        bad="high",
        applies_to=_FEEDS,
        source="GraMa, arXiv:2505.24061",
        unit="share",
        reads="Share of units the loss practically never asks to change.",
        advice="High beside the twin: a candidate for a reset of these units.",
    ),
)

_ACTIVATION = (
    _metric(
        "saturated_fraction",
        "Saturated inputs of the activation (|f'| < 0.01)",
        "activation",
        "share of pre-activations z with |f'(z)| < 0.01",
        low=0,
        high=1,
        bad="high",
        applies_to=_FEEDS,
        unit="share",
        source="standard; one definition for every activation by its own derivative",
        reads="Share of values at which the activation passes practically no gradient back. About "
        "half is normal for ReLU.",
        advice="Above the twin: the layer's outputs sit in the flat part for your data. Resetting "
        "the layer, and the norm after it, brings them back.",
    ),
    _metric(
        "rho_b",
        "Saturation of a bounded activation (rho_B)",
        "activation",
        "mean |2 (h - low) / (high - low) - 1|; equal to the definition with B = 10 bins, because "
        "no bin straddles the middle",
        low=0,
        high=1,
        bad="high",
        applies_to=_BOUNDED,
        unit="1",
        source="Rakitianskaia & Engelbrecht, IEEE SSCI 2015",
        reads="0: outputs sit in the middle of the range. 0.5: spread evenly. 1: all at the ends.",
        advice="Near 1 and above the twin: gates are stuck open or shut. ReLU6 rests at its lower "
        "end by nature: read the ratio.",
    ),
    _metric(
        "dead_fraction",
        "Dead units",
        "activation",
        "share of units that are 0 on every sample and position",
        low=0,
        high=1,
        bad="high",
        applies_to=_RECTIFIED,
        unit="share",
        source="standard",
        reads="Share of units that no measured sample makes fire.",
        advice="Dead units cannot recover by themselves. Measure more samples, then reset.",
    ),
    _metric(
        "rarely_active_fraction",
        "Units active less than 1 % of the time",
        "activation",
        "share of units with P(z_i > 0) < 0.01",
        low=0,
        high=1,
        bad="high",
        applies_to=_RECTIFIED,
        unit="share",
        source="Amazon SageMaker Debugger, rule DeadRelu",
        reads="Share of units that nearly no image and position makes fire.",
        advice="SageMaker Debugger flags a layer above one half.",
    ),
    _metric(
        "dormant_fraction",
        "Units that hardly ever fire (dormant, tau = 0.025)",
        "activation",
        "share of units with E|h_i| <= tau * mean over units of E|h|",
        low=0,
        high=1,
        bad="high",
        applies_to=_FEEDS,
        unit="share",
        source="Sokar et al. 2023, arXiv:2302.12902 (ReDo)",
        reads="Share of units that are quiet against their neighbours. Rescaling the whole layer "
        "does not change it: look at the mean magnitude too.",
        advice="High beside the twin: units the pretraining used and your data does not.",
    ),
    _metric(
        "near_zero_output_fraction",
        "Outputs near zero (|h| <= 0.05)",
        "activation",
        "share of outputs with |h| <= 0.05",
        low=0,
        high=1,
        bad="high",
        applies_to=_FEEDS,
        unit="share",
        source="fastai's ActivationStats, near-zero band 0.05",
        reads="How much of what the layer hands on is practically nothing.",
        advice="Read it with the mean magnitude: on a small scale everything is near zero.",
    ),
    _metric(
        "activation_mean_abs",
        "Mean output magnitude",
        "activation",
        "E|h|",
        low=0,
        scale="log",
        bad=None,
        applies_to=_FEEDS,
        unit="activation",
        source="standard",
        reads="Scale of what the layer hands on.",
        advice="Orders of magnitude from the twin's: later layers see another scale than they "
        "would at the start of training.",
    ),
    _metric(
        "sign_entropy",
        "Sign entropy",
        "activation",
        "mean over units of H2(P(z_i > 0)), in bits",
        low=0,
        high=1,
        bad="low",
        applies_to=_FEEDS,
        unit="bit",
        source="standard",
        reads="1: each unit is on half of the time. 0: units never change sign, so the layer is "
        "linear for your data.",
        advice="Low beside the twin: the units hardly discriminate between your images.",
    ),
    _metric(
        "activation_effective_rank",
        "Effective rank of the outputs",
        "activation",
        "exp(-sum p log p), p = s / sum s over singular values s of sampled rows of h",
        low=0,
        scale="log",
        bad="low",
        applies_to=_FEEDS,
        unit="1",
        source="Roy & Vetterli 2007; as a sign of plasticity Lyle et al. 2022, arXiv:2204.09560",
        reads="How many directions the outputs really use on your data. At most the number of "
        "units or of sampled rows, whichever is smaller: the cap is shown.",
        advice="Far below the twin: the features have collapsed onto few directions.",
    ),
    _metric(
        "activation_srank",
        "Directions for 99 % of the outputs (srank)",
        "activation",
        "smallest k with s_1 + ... + s_k >= 0.99 sum s",
        low=0,
        scale="log",
        bad="low",
        applies_to=_FEEDS,
        unit="1",
        source="Kumar et al. 2021, arXiv:2010.14498",
        reads="As the effective rank, counted; capped by units and sampled rows. Some libraries "
        "call a relative of it layer saturation; it is a rank.",
        advice="Far below the twin: the features have collapsed onto few directions.",
    ),
    _metric(
        "attention_entropy",
        "Attention entropy",
        "activation",
        "mean over heads and queries of -sum_k a_k log a_k / log(keys)",
        low=0,
        high=1,
        bad="low",
        applies_to=_ASKS,
        unit="share",
        source="standard; as a sign of collapse Zhai et al. 2023, arXiv:2303.06296",
        reads="1: every key gets the same attention. 0: one key gets all of it, and the softmax "
        "passes no gradient back. A sample of queries is looked at.",
        advice="Near 0: saturated heads; resetting queries and keys frees them. Near 1: heads that "
        "have not learnt to look anywhere.",
    ),
)

_WEIGHT = (
    _metric(
        "weight_l2",
        "Weight norm",
        "weight",
        "||W||_2",
        low=0,
        scale="log",
        bad="high",
        applies_to=_WEIGHTED,
        unit="weight",
        source="standard",
        reads="Size of the weight; its ratio to the twin's says how far training inflated it.",
        advice="Large against the twin: the same gradient moves it relatively less.",
    ),
    _metric(
        "weight_mean",
        "Weight mean",
        "weight",
        "mean of the entries",
        bad=None,
        applies_to=_WEIGHTED,
        unit="weight",
        source="standard",
        reads="Far from 0 against the spread: the weights lean to one side.",
        advice="Rarely acts alone; read it with the standard deviation.",
    ),
    _metric(
        "weight_std",
        "Weight standard deviation",
        "weight",
        "sqrt(mean (w - mean)^2)",
        low=0,
        scale="log",
        bad=None,
        applies_to=_WEIGHTED,
        unit="weight",
        source="standard",
        reads="Spread of the entries.",
        advice="The twin's is what the architecture's own initialisation draws.",
    ),
    _metric(
        "weight_kurtosis",
        "Weight kurtosis (excess)",
        "weight",
        "mean (w - mean)^4 / var^2 - 3",
        bad="high",
        applies_to=_WEIGHTED + " with unequal entries",
        unit="1",
        source="standard",
        reads="0 for a normal distribution; high when a few large weights dominate.",
        advice="High: few large entries carry the layer. Weight-level rules find them.",
    ),
    _metric(
        "near_zero_fraction",
        "Weights near zero (|w| < 0.001)",
        "weight",
        "share of entries with |w| < 0.001",
        low=0,
        high=1,
        bad="high",
        applies_to=_WEIGHTED,
        unit="share",
        source="standard",
        reads="Share of entries that hardly contribute.",
        advice="High beside the twin: capacity that fine-tuning may have to regrow.",
    ),
    _metric(
        "stable_rank",
        "Stable rank of the weight",
        "weight",
        "||W||_F^2 / ||W||_2^2",
        low=0,
        scale="log",
        bad="low",
        applies_to=_MATRIX,
        unit="1",
        source="standard",
        reads="How many directions the weight really uses, by energy; at most min(rows, columns).",
        advice="Far below the twin: a few directions dominate.",
    ),
    _metric(
        "effective_rank",
        "Effective rank of the weight",
        "weight",
        "exp(-sum p log p), p = s / sum s over singular values s",
        low=0,
        scale="log",
        bad="low",
        applies_to=_MATRIX,
        unit="1",
        source="Roy & Vetterli 2007",
        reads="How evenly the weight spreads over its directions; at most min(rows, columns).",
        advice="Falls with training; far below the twin it goes with loss of plasticity.",
    ),
    _metric(
        "isometry_distance",
        "Distance from isometry",
        "weight",
        "||W'W - I||_F^2 over its smaller side, = mean (s^2 - 1)^2",
        low=0,
        scale="log",
        bad="high",
        applies_to=_MATRIX,
        unit="1",
        source="the deviation that FIRE drives to 0, arXiv:2602.08040",
        reads="0: the weight keeps lengths and angles. 1: it shrinks all to nothing. Above: some "
        "directions are blown up.",
        advice="Far above the twin: a few directions are stretched; FIRE is the rule made for it.",
    ),
    _metric(
        "power_law_alpha",
        "Power-law exponent of the spectrum",
        "weight",
        "alpha of p(lambda) ~ lambda^-alpha fitted to the upper tail of the eigenvalues of W'W",
        low=1,
        bad=None,
        applies_to=_MATRIX + " and 20 eigenvalues or more",
        unit="1",
        source="fit of Clauset et al., arXiv:0706.1062, as Martin & Mahoney apply it to layers. It "
        "differs from WeightWatcher (0.7.7) in four ways. Our tail holds a tenth of the "
        "eigenvalues and never fewer than ten; theirs may hold two. Our distance compares the law "
        "with both edges of each step of the empirical distribution; theirs with the lower edge. "
        "Of a convolution we take the flattened kernel; they pool the spectra of its places. They "
        "also fit 8 to 19 eigenvalues, and drop those below 1e-5",
        reads="Trained layers often lie between 2 and 6. Small random layers do too: no label "
        "follows from the number alone. It is not WeightWatcher's alpha: over the 89 layers of the "
        "embedded networks that both fit, the two differ by 0.06 in the median and by 10.6 at "
        "most, and by more than 1 in 19 layers; over the layers of their fresh twins by 0.00 and "
        "42, and by more than 1 in 38.",
        advice="Read it beside the twin's; far from it, training has shaped the spectrum.",
    ),
)

_TRANSFER = (
    _metric(
        "probe_accuracy",
        "Linear-probe accuracy of the features",
        "transfer",
        "five-fold accuracy of ridge regression on the layer's output, averaged over positions",
        low=0,
        high=1,
        bad="low",
        applies_to=_FEATURES,
        unit="share",
        source="Alain & Bengio 2016, arXiv:1610.01644; ridge and five folds are ours",
        reads="How well a linear model reads your classes off this layer.",
        advice="No better than the twin's: what pretraining put here is of no use for your data, "
        "so little is lost by resetting it. Far better: keep it.",
    ),
    _metric(
        "logme",
        "Evidence of the labels (LogME)",
        "transfer",
        "log maximum evidence of the one-hot labels under a linear model, nats an image",
        bad="low",
        applies_to=_FEATURES,
        unit="nat",
        source="You et al. 2021, arXiv:2102.11005",
        reads="As the probe, without a choice of penalty; only differences say anything.",
        advice="Compare layers of one network, or the layer with its twin; the ratio has no "
        "meaning here.",
    ),
    _metric(
        "cka_twin",
        "Similarity to the fresh twin (linear CKA)",
        "transfer",
        "<K, L> / (||K|| ||L||), K and L the centred Gram matrices of both networks' features",
        low=0,
        high=1,
        bad=None,
        applies_to=_FEATURES,
        unit="1",
        source="Kornblith et al. 2019, arXiv:1905.00414",
        reads="1: the layer sees your images as a fresh network does. Near 0: quite differently.",
        advice="Near 1 in a deep layer: pretraining changed nothing that your data notices.",
    ),
)

_BY_UNIT = (
    _metric(
        "unit_weight_l2",
        "Weight norm of the unit",
        "weight",
        "||W_i||_2 over the unit's inputs",
        low=0,
        scale="log",
        bad=None,
        level="unit",
        applies_to=_MATRIX,
        unit="weight",
        source="standard",
        reads="Size of a unit's incoming weights.",
        advice="Compare with the other units and the twin.",
    ),
    _metric(
        "unit_grad_l2",
        "Gradient norm of the unit's weights",
        "gradient",
        "||g_i||_2",
        low=0,
        scale="log",
        bad="low",
        level="unit",
        applies_to=_TRAINED,
        unit="loss per weight unit",
        source="standard",
        reads="How strongly the unit's incoming weights are pushed.",
        advice="Near 0: the unit will not move.",
    ),
    _metric(
        "unit_saturated_fraction",
        "Saturated inputs of the unit",
        "activation",
        "share of z_i with |f'(z_i)| < 0.01",
        low=0,
        high=1,
        bad="high",
        level="unit",
        applies_to=_FEEDS,
        unit="share",
        source="standard",
        reads="1: the unit passes no gradient on any sample.",
        advice="Near 1: reset candidate.",
    ),
    _metric(
        "unit_mean_abs",
        "Mean output magnitude of the unit",
        "activation",
        "E|h_i|",
        low=0,
        scale="log",
        bad="low",
        level="unit",
        applies_to=_FEEDS,
        unit="activation",
        source="standard",
        reads="How much the unit fires.",
        advice="0: the unit is silent.",
    ),
    _metric(
        "unit_dormant_score",
        "Dormant score of the unit",
        "activation",
        "E|h_i| / mean over units",
        low=0,
        scale="log",
        bad="low",
        level="unit",
        applies_to=_FEEDS,
        unit="1",
        source="Sokar et al. 2023, arXiv:2302.12902",
        reads="1 is the layer's average; at most 0.025 counts as dormant.",
        advice="Low: reset candidate.",
    ),
    _metric(
        "unit_grad_mean_abs",
        "Gradient at the unit",
        "gradient",
        "E|dL_n/dh_i|",
        low=0,
        scale="log",
        bad="low",
        level="unit",
        applies_to=_FEEDS,
        unit="loss per output unit",
        source="GraMa, arXiv:2505.24061",
        reads="How much the loss asks this unit to change.",
        advice="Low beside its neighbours: the loss ignores the unit.",
    ),
    _metric(
        "head_attention_entropy",
        "Attention entropy of the head",
        "activation",
        "mean over queries of -sum_k a_k log a_k / log(keys)",
        low=0,
        high=1,
        bad="low",
        level="unit",
        applies_to=_ASKS,
        unit="share",
        source="Zhai et al. 2023, arXiv:2303.06296",
        reads="0: the head always looks at one key. 1: it looks everywhere alike.",
        advice="Near 0: a saturated head.",
    ),
)

METRICS: tuple[MetricInfo, ...] = (*_GRADIENT, *_ACTIVATION, *_WEIGHT, *_TRANSFER, *_BY_UNIT)


def list_metrics() -> tuple[MetricInfo, ...]:
    """Return the registry, in the order in which tables show it."""
    return METRICS


def metric_names(level: str = "layer") -> tuple[str, ...]:
    """Return the names of the metrics of one level, in order."""
    return tuple(metric.name for metric in METRICS if metric.level == level)
