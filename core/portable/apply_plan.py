"""Start your own training from a Limber plan. Needs torch and safetensors, nothing else.

This file lies beside plan.json and reinit.safetensors, which a plan's export wrote. The edited
weights are in the second; the first says what was reset, what shall not train, and which layers
train at another rate.

    from apply_plan import apply_plan, parameter_groups

    model = ...                                # as the plan says: architecture, number of classes
    apply_plan(model, "folder/of/the/export")  # edited weights, freezing, and a check of every bit
    groups = parameter_groups(model, "folder/of/the/export", lr=1e-3, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups)

    python apply_plan.py model.safetensors     # does this file hold what the plan makes?
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

PLAN = "plan.json"
WEIGHTS = "reinit.safetensors"
DIGEST = "limber_sha256"
WRAPPERS = ("module.", "_orig_mod.", "timm_model.", "model.")


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        flat = value.reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def read_plan(folder: str | Path = ".") -> dict[str, Any]:
    """Return the plan of an export."""
    content: dict[str, Any] = json.loads((Path(folder) / PLAN).read_text(encoding="utf-8"))
    return content


def read_weights(folder: str | Path = ".") -> tuple[dict[str, Tensor], str]:
    """Return the edited weights of an export and the digest they were written with.

    Each tensor has the shape it has in the network.

    Raises:
        ValueError: The file was changed since, or belongs to another plan.
    """
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        told = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if json.loads(told["limber_plan"]) != read_plan(folder):
        raise ValueError(f"{WEIGHTS} was made by another plan than {PLAN}. Export the plan again.")
    if state_sha256(state) != told[DIGEST]:
        raise ValueError(f"{WEIGHTS} is not as it was written. Export the plan again.")
    return state, told[DIGEST]


def bare_name(name: str, known: Mapping[str, Any]) -> str:
    """Return a parameter's name without what wrappers put before it."""
    bare = name
    while bare not in known:
        wrapper = next((prefix for prefix in WRAPPERS if bare.startswith(prefix)), None)
        if wrapper is None:
            return name
        bare = bare.removeprefix(wrapper)
    return bare


def apply_plan(model: nn.Module, folder: str | Path = ".", *, freeze: bool = True) -> str:
    """Load the edited weights into a model and freeze what the plan freezes.

    Doing it twice changes nothing. Do it before the optimizer is made, and not when training is
    resumed from a checkpoint of your own.

    Args:
        model: Built as the plan says, wrapped or not.
        folder: Where plan.json and reinit.safetensors lie.
        freeze: Whether to turn off the gradients of the layers that the plan freezes.

    Returns:
        The SHA-256 of the model's state, which is the one the export wrote down.

    Raises:
        ValueError: The model has other tensors than the plan's.
    """
    state, digest = read_weights(folder)
    own = model.state_dict()
    names = {name: bare_name(name, state) for name in own}
    for name, bare in names.items():
        if bare not in state:
            raise ValueError(f'The model has "{name}", which the plan\'s network lacks.')
        if own[name].shape != state[bare].shape:
            raise ValueError(
                f'"{name}" is {tuple(own[name].shape)} in the model and '
                f"{tuple(state[bare].shape)} in the plan's weights. Build the model with "
                f"{read_plan(folder)['model']['classes']} classes."
            )
    missing = sorted(state.keys() - set(names.values()))
    if missing:
        raise ValueError(f'The model lacks "{missing[0]}", which the plan\'s network has.')
    loading = OrderedDict((name, state[bare]) for name, bare in names.items())
    # Some networks (torchvision's MNASNet) refuse a state without its modules' format versions.
    loading._metadata = getattr(own, "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(loading, strict=True)
    if freeze:
        frozen = set(read_plan(folder)["freeze"])
        for name, parameter in model.named_parameters():
            bare = bare_name(name, state)
            if bare in frozen or bare.rpartition(".")[0] in frozen:
                parameter.requires_grad_(False)
    found = state_sha256({names[name]: value for name, value in model.state_dict().items()})
    if found != digest:
        raise ValueError("The model keeps its weights in another dtype than the plan's (float32).")
    return digest


def parameter_groups(
    model: nn.Module,
    folder: str | Path = ".",
    *,
    lr: float,
    weight_decay: float = 0.0,
    style: str = "torch",
) -> list[dict[str, Any]]:
    """Return the parameters that train, in groups by learning rate and weight decay.

    Vectors (biases, norms) get no weight decay. Groups are called `layer_<id>_decay` and
    `layer_<id>_no_decay`, 0 being the layers without a rate of their own.

    Args:
        model: After `apply_plan`.
        folder: Where plan.json lies.
        lr: Learning rate of layers without a factor.
        weight_decay: Of matrices.
        style: "torch" writes each group's own `lr`; "timm" writes `lr_scale`, which timm's
            schedulers multiply the rate with.
    """
    factors = {row["layer"]: row["factor"] for row in read_plan(folder)["learning_rates"]}
    ids = {layer: place for place, layer in enumerate(factors, start=1)}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = _layer_of(name, factors)
        factor = factors.get(layer, 1.0)
        decays = parameter.ndim > 1
        key = f"layer_{ids.get(layer, 0)}_{'decay' if decays else 'no_decay'}"
        group = groups.setdefault(
            key,
            {
                "name": key,
                "params": [],
                "param_names": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr": lr if style == "timm" else lr * factor,
                **({"lr_scale": factor} if style == "timm" else {}),
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def _layer_of(name: str, factors: Mapping[str, float]) -> str:
    for candidate in (name, name.rpartition(".")[0]):
        bare = bare_name(candidate, factors)
        if bare in factors:
            return bare
    return ""


def model_init(build: Callable[[], nn.Module], folder: str | Path = ".") -> Callable[[], nn.Module]:
    """Return a function that builds a model with the plan applied, for the HF Trainer."""

    def start(trial: Any = None) -> nn.Module:
        del trial
        model = build()
        apply_plan(model, folder)
        return model

    return start


def lightning_callback(folder: str | Path = ".", *, attribute: str | None = None) -> Any:
    """Return a Lightning callback that applies the plan before the optimizers are made.

    Args:
        folder: Where plan.json and reinit.safetensors lie.
        attribute: Name of the network in the LightningModule; None takes the module itself.
    """
    base: Any
    try:
        base = importlib.import_module("lightning.pytorch").Callback
    except ImportError:
        base = importlib.import_module("pytorch_lightning").Callback

    class ApplyPlan(base):
        """Applies the plan once, at the start of fitting from scratch."""

        def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
            """Apply the plan, unless training is resumed: its checkpoint has what it needs."""
            network = pl_module if attribute is None else pl_module.get_submodule(attribute)
            if stage == "fit" and trainer.ckpt_path is None:
                apply_plan(network, folder)

    return ApplyPlan()


def main() -> int:
    """Say whether a safetensors file holds the weights that the plan beside this script makes."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    folder = Path(__file__).parent
    state, digest = read_weights(folder)
    try:
        with safe_open(sys.argv[1], "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        print(f"{sys.argv[1]} cannot be read as safetensors ({error}).")
        return 2
    if state_sha256(tensors) == digest:
        print("These are the weights that the plan makes.")
        return 0
    odd = sorted(
        name
        for name in state.keys() | tensors.keys()
        if name not in state
        or name not in tensors
        or state_sha256({name: state[name]}) != state_sha256({name: tensors[name]})
    )
    print(f"{len(odd)} tensors differ from what the plan makes, first {odd[0]}.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
