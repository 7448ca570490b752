"""Plan -> the network it was made for, with the plan applied."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from core.edit.apply import edited_state
from core.errors import PlanError
from core.files.companions import plan_json, sorted_metadata
from core.files.plans import named_after
from core.files.whole import write_whole
from core.load import (
    LoadedModel,
    build_module,
    load_model,
    state_sha256,
)
from core.pipeline.batches import outline_model
from core.plan.making import check_plan, untrained_sentence
from core.records import (
    ModelOutline,
    ModelSpec,
    ReinitPlan,
    ReinitReceipt,
)


def plan_outline(plan: ReinitPlan) -> ModelOutline:
    """Return the outline of the network a plan was made for, and check that it still fits.

    Raises:
        PlanError: The weights on this machine are not the plan's.
        LimberError: The model cannot be loaded.
    """
    outline = outline_model(
        plan_spec(plan), classes=plan_classes(plan), head_seed=plan.model.head_seed
    )
    check_plan(plan, outline)
    return outline


def plan_spec(plan: ReinitPlan) -> ModelSpec:
    """Return the specification of the network a plan was made for."""
    model = plan.model
    return ModelSpec(
        source=model.source,
        name=model.name,
        weights=model.weights,
        checkpoint=model.checkpoint,
        kwargs=dict(model.kwargs),
    )


def plan_classes(plan: ReinitPlan) -> int | None:
    """Return the size of a plan's new head; None for the head that came with the weights."""
    return None if plan.model.head == "own" else plan.model.classes


def edited_model(
    plan: ReinitPlan, *, classes: int | None = None, head_seed: int | None = None
) -> tuple[LoadedModel, ReinitReceipt]:
    """Load the plan's network with the plan applied.

    Args:
        plan: Read and validated.
        classes: Size of a new head, for a plan that writes nothing into the head; None takes the
            plan's own head.
        head_seed: Another seed for a new head than the plan's; the reset values stay the plan's.

    Raises:
        PlanError: The weights at hand are not the plan's, or it names what is not there.
    """
    spec, wanted = plan_spec(plan), plan_classes(plan) if classes is None else classes
    seed = plan.model.head_seed if head_seed is None else head_seed
    loaded = load_model(spec, classes=wanted, head_seed=seed)
    # With no weights to load the backbone is random and follows the head's seed.
    comparable = spec.weights != "none" or seed == plan.model.head_seed
    if comparable and loaded.card.backbone_sha256 != plan.model.backbone_sha256:
        raise PlanError(
            f"The plan was made for weights {plan.model.backbone_sha256[:12]}..., and the weights "
            f"at hand are {loaded.card.backbone_sha256[:12]}.... Load the weights the plan was "
            "made for, or make the plan again on these."
        )
    module = loaded.module
    edited, receipt = edited_state(
        module.state_dict(),
        plan,
        # With the plan's own head: a constructor draws in order, and the size of the head moves
        # what comes after it.
        fresh=lambda twin_seed: build_module(
            spec, classes=plan.model.classes if loaded.head else None, seed=twin_seed
        ).state_dict(),
        parameters=frozenset(name for name, _ in module.named_parameters(remove_duplicate=False)),
        sha256=state_sha256,
        plan_text=plan_json(plan),
    )
    load_edited(module, edited)
    if plan.untrained:
        warnings = (*receipt.warnings, untrained_sentence(plan.untrained))
        receipt = receipt.model_copy(update={"warnings": warnings})
    return loaded, receipt


def load_edited(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load edited weights in the module's shapes, telling its own format versions along.

    Some networks (torchvision's MNASNet) refuse a state that does not say which version it is.
    """
    told = OrderedDict(state)
    told._metadata = getattr(module.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    module.load_state_dict(told)


def reset_weights(plan: ReinitPlan, out: Path) -> ReinitReceipt:
    """Apply a plan and write the edited weights, with the plan in the file's metadata.

    The same plan on the same weights gives the same bytes.

    Raises:
        LimberError: The plan does not fit, or the file cannot be written.
    """
    state, receipt = edited_weights(plan)
    metadata = {
        "format": "pt",
        # As an export calls its files, so that what a plan's own file is called does not matter.
        "limber_plan": plan_json(named_after(plan, Path("plan.json"))),
        "limber_sha256": receipt.after_sha256,
    }
    data = safetensors.torch.save(dict(sorted(state.items())), metadata=metadata)
    write_whole(out, sorted_metadata(data))
    return receipt


def edited_weights(plan: ReinitPlan) -> tuple[dict[str, Tensor], ReinitReceipt]:
    """Return the state that a plan makes, no two tensors sharing memory, and the receipt.

    Each tensor is contiguous and has the shape that the network's own has.

    Raises:
        LimberError: The plan does not fit.
    """
    loaded, receipt = edited_model(plan)
    return plain_state(loaded.module), receipt


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a network's state on the CPU, in its shapes, no two tensors sharing memory."""
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    shared: dict[int, str] = {}
    for name, value in state.items():
        # The format refuses tensors that share memory; trainers load by name and tie again.
        if value.numel() and shared.setdefault(value.data_ptr(), name) != name:
            state[name] = value.clone()
    return state
