"""A plan -> code that starts training from its export, for each trainer."""

from __future__ import annotations

from typing import Literal

from core.errors import OptionError
from core.records import ReinitPlan

Trainer = Literal["timm", "torchvision", "torch", "lightning", "hf"]


TRAINERS: tuple[Trainer, ...] = ("timm", "torchvision", "torch", "lightning", "hf")


def snippet(plan: ReinitPlan, trainer: str = "timm", *, weights: str = "reinit.safetensors") -> str:
    """Return code that starts training from an exported plan.

    Args:
        plan: The plan the weights were made from.
        trainer: "timm" (its own training script), "torchvision", "torch" (any loop),
            "lightning" (a callback) or "hf" (the Trainer's model_init).
        weights: Name of the exported file.

    Raises:
        OptionError: Unknown trainer.
    """
    if trainer not in TRAINERS:
        raise OptionError(f'There is no snippet for "{trainer}". Known: {", ".join(TRAINERS)}.')
    model = plan.model
    build = _constructor(plan)
    apply = 'apply_plan(model, ".")  # loads, freezes what the plan freezes, checks every bit\n'
    if trainer == "timm" and model.source != "torchvision":
        name = _timm_name(plan)
        extra = "".join(f" {key}={value!r}" for key, value in model.kwargs.items())
        kwargs = f" \\\n    --model-kwargs{extra}" if extra else ""
        note = (
            "# Frozen layers and learning rates: the script has no option by layer; use the torch\n"
            "# snippet.\n"
            if plan.freeze or plan.learning_rates
            else ""
        )
        return (
            f"{note}# timm's training script. --initial-checkpoint keeps the head that is in the\n"
            "# file; --pretrained-path would draw a new one.\n"
            f"python train.py --data-dir DATA --model {name} \\\n"
            f"    --initial-checkpoint {weights} --num-classes {model.classes}{kwargs}\n"
        )
    library = "import torchvision\n" if model.source == "torchvision" else "import timm\n"
    if trainer == "torchvision" or (trainer == "timm" and model.source == "torchvision"):
        return (
            "# In torchvision's reference train.py, in place of the line that makes the model:\n"
            f"{library}from apply_plan import apply_plan\n\n{build}\n{apply}"
        )
    if trainer == "lightning":
        return (
            f"{library}import lightning\nfrom apply_plan import lightning_callback\n\n"
            f"# In your module's __init__: self.{build}\n"
            'start = lightning_callback(".", attribute="model")\n'
            "lightning.Trainer(callbacks=[start]).fit(YourModule(), data)\n"
        )
    if trainer == "hf":
        return (
            f"{library}from apply_plan import model_init\nfrom transformers import Trainer\n\n"
            f"def build():\n    {build}\n    return model  # wrapped as your Trainer needs it\n\n"
            'start = model_init(build, ".")\n'
            "Trainer(model_init=start, args=arguments, train_dataset=data).train()\n"
        )
    return (
        f"{library}from apply_plan import apply_plan, parameter_groups\n\n{build}\n{apply}"
        'groups = parameter_groups(model, ".", lr=1e-3, weight_decay=0.01)\n'
        "optimizer = torch.optim.AdamW(groups)  # ... then your own loop, as for any model\n"
    ).replace("import t", "import torch\nimport t", 1)


def _timm_name(plan: ReinitPlan) -> str:
    # Embedded models carry timm's own names; a test holds the catalogue to it.
    return plan.model.name.split(".", 1)[0] if plan.model.source == "timm" else plan.model.name


def _constructor(plan: ReinitPlan) -> str:
    model = plan.model
    kwargs = "".join(f", {key}={value!r}" for key, value in model.kwargs.items())
    if model.source == "torchvision":
        return (
            f"model = torchvision.models.get_model({model.name!r}, weights=None, "
            f"num_classes={model.classes}{kwargs})"
        )
    return f"model = timm.create_model({_timm_name(plan)!r}, num_classes={model.classes}{kwargs})"
