"""From a specification to a network: embedded weights, timm, torchvision, one's own file.

The head is told apart by construction, not by name: it is whatever changes shape when the
number of classes does. That holds for auxiliary heads and for libraries with no convention.
"""

from __future__ import annotations

import difflib
import json
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import LimberError, ModelError, Remedy
from core.files.inputs import in_words, is_input
from core.limits import free_memory
from core.load.checkpoints import (
    SPARE_BYTES,
    read_checkpoint,
    read_state,
    state_bytes,
    state_sha256,
    without_wrappers,
)
from core.load.network import require_host
from core.load.soundness import fitted_state
from core.network.hooks import memory_kept, module_kept
from core.records import ModelCard, ModelEntry, ModelSpec, Note, Preprocessing
from core.records.specs import odd_kwarg, odd_name
from core.seeding import random_state_kept

ASSETS = Path(__file__).resolve().parents[2] / "assets"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SHORT_RUN_SIZE = 128
LARGER_SIZES = (160, 192, 224, 256, 288, 320, 384)
SMALLEST_PATCH = 8
LR_WITH_BATCH_NORM = 1e-3
LR_WITHOUT = 2e-5
# A state may hold so many times what the model takes: other towers, averages of the weights.
MOST_STATE = 8
# timm families whose position embedding can be interpolated in the forward pass, so that the
# stored weights do not depend on the image size.
DYNAMIC_SIZE_FAMILIES = frozenset({"vision_transformer", "deit", "eva"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A network on the CPU in float32, its card, and the `state_dict` names of its head."""

    module: nn.Module
    card: ModelCard
    head: frozenset[str]


@cache
def embedded_catalogue() -> dict[str, dict[str, Any]]:
    """Return the embedded models by name, as `assets/weights/catalogue.json` lists them."""
    entries = json.loads((ASSETS / "weights" / "catalogue.json").read_text(encoding="utf-8"))
    return {entry["name"]: entry for entry in entries}


@cache
def _timm_names() -> frozenset[str]:
    import timm

    return frozenset(timm.list_models())


@cache
def _torchvision_names() -> frozenset[str]:
    import torchvision.models as tv

    return frozenset(tv.list_models(module=tv))


@cache
def _counted_parameters() -> dict[str, int]:
    path = ASSETS / "timm_parameters.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["parameters"])


def list_models() -> tuple[ModelEntry, ...]:
    """Return every model: the embedded ones first, then timm's, then torchvision's."""
    import torchvision.models as tv

    rows = [
        ModelEntry(
            name=name,
            source="embedded",
            embedded=True,
            parameters=entry["parameters"],
            title=entry["title"],
            kind=entry["kind"],
            licence=entry["licence"],
        )
        for name, entry in embedded_catalogue().items()
    ]
    counted = _counted_parameters()
    rows += [
        ModelEntry(
            name=f"timm:{name}",
            source="timm",
            embedded=False,
            title=name,
            parameters=counted.get(name),
        )
        for name in sorted(_timm_names())
    ]
    rows += [
        ModelEntry(
            name=f"torchvision:{name}",
            source="torchvision",
            embedded=False,
            title=name,
            parameters=tv.get_model_weights(name).DEFAULT.meta["num_params"],
        )
        for name in sorted(_torchvision_names())
    ]
    return tuple(rows)


def resolve_model(
    name: str, *, weights: str = "pretrained", checkpoint: str | None = None
) -> ModelSpec:
    """Find which library has a model of that name; nothing is loaded.

    Args:
        name: A bare name (looked up among the embedded, then timm, then torchvision), or
            "timm:NAME", "torchvision:NAME", "embedded:NAME" to force one.
        weights: "pretrained" or "none"; ignored when `checkpoint` is given.
        checkpoint: Path of one's own weights.

    Raises:
        ModelError: No library has it (the message names the nearest), or the weights choice or
            the checkpoint path is wrong.
    """
    if weights not in ("pretrained", "none"):
        raise ModelError(
            f'Weights "{weights}" are not known. Say "pretrained" or "none", or give a checkpoint.'
        )
    if checkpoint is not None and weights == "none":
        raise ModelError("Random weights and a checkpoint were asked for. Give one of the two.")
    if checkpoint is not None and not is_input(Path(checkpoint)):
        raise ModelError(f'There is no checkpoint file "{checkpoint}". Check the path.')
    prefix, colon, bare = name.partition(":")
    forced = prefix if colon else None
    bare = bare if colon else name
    if forced not in (None, "embedded", "timm", "torchvision"):
        raise ModelError(
            f'Model "{name}" asks for the library "{forced}". Known are embedded, timm and '
            "torchvision."
        )
    chosen: dict[str, Any] = {
        "weights": "checkpoint" if checkpoint else weights,
        "checkpoint": checkpoint,
    }
    if forced in (None, "embedded") and bare in embedded_catalogue():
        entry = embedded_catalogue()[bare]
        return ModelSpec(source="embedded", name=bare, kwargs=entry["kwargs"], **chosen)
    if forced in (None, "timm"):
        architecture = bare.split(".", 1)[0]
        if architecture in _timm_names():
            return ModelSpec(source="timm", name=bare, kwargs=_timm_kwargs(bare), **chosen)
    if forced in (None, "torchvision") and bare in _torchvision_names():
        return ModelSpec(source="torchvision", name=bare, **chosen)
    raise _unknown_model(bare, forced)


def _unknown_model(bare: str, forced: str | None) -> ModelError:
    known: set[str] = set()
    if forced in (None, "embedded"):
        known |= set(embedded_catalogue())
    if forced in (None, "timm"):
        known |= _timm_names()
    if forced in (None, "torchvision"):
        known |= _torchvision_names()
    near = difflib.get_close_matches(bare[:100], known, n=3, cutoff=0.6)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    where = forced or "the embedded models, timm or torchvision"
    return ModelError(f'Model "{bare[:200]}" is not in {where}.{hint}', Remedy.LIST_MODELS)


def _timm_kwargs(name: str) -> dict[str, bool | int | float | str]:
    import timm
    from timm.models import _registry

    try:
        config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:
        raise ModelError(
            f'timm does not know the weights "{name}": {_first_line(error)}. Leave the tag after '
            "the dot away for the default ones."
        ) from error
    family = _registry._model_to_module.get(name.split(".", 1)[0])
    if config is not None and config.fixed_input_size and family in DYNAMIC_SIZE_FAMILIES:
        return {"dynamic_img_size": True}
    return {}


def build_module(spec: ModelSpec, *, classes: int | None, seed: int) -> nn.Module:
    """Build the architecture with its own initialisation, drawn from `seed`: a fresh network.

    The same arguments give the same bits; global random state stays as it is. This, with the
    class count of the model at hand, is what the whole project calls the *fresh twin*.

    Args:
        spec: Which architecture; its weights are not looked at.
        classes: Size of the head; 0 builds none, None keeps the architecture's own.
        seed: Seed of the draw.

    Raises:
        ModelError: The library refuses to build it.
    """
    with random_state_kept(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _construct(spec, classes).float()
        except LimberError:
            raise
        except Exception as error:
            raise ModelError(
                f'{spec.source} cannot build "{spec.name}" for {classes} classes: '
                f"{_first_line(error)}. Choose another model."
            ) from error


def check_spec(spec: ModelSpec) -> None:
    """Raise unless a specification, perhaps a stranger's, names a model of its library.

    Of other names timm makes requests to a hub or opens folders, and runs what it finds there;
    of other arguments the libraries open files.

    Raises:
        ModelError: The library lists no such model, or the arguments are not known to be harmless.
    """
    listed: frozenset[str] | dict[str, Any] = frozenset()
    if spec.source == "embedded":
        listed = embedded_catalogue()
    elif odd_name(spec.name) is None:
        listed = _timm_names() if spec.source == "timm" else _torchvision_names()
    name = spec.name.split(".", 1)[0] if spec.source == "timm" else spec.name
    if name not in listed:
        raise _unknown_model(spec.name, spec.source)
    problem = odd_kwarg(spec.kwargs)
    if problem is not None:
        raise ModelError(f'The model "{spec.name}" cannot be built as asked: {problem}.')


def _construct(spec: ModelSpec, classes: int | None) -> nn.Module:
    check_spec(spec)
    sized: dict[str, Any] = dict(spec.kwargs)
    if classes is not None:
        sized["num_classes"] = classes
    if spec.source == "torchvision":
        import torchvision.models as tv

        extra: dict[str, Any] = {}
        if spec.name in ("googlenet", "inception_v3"):
            extra["init_weights"] = True
        if spec.name.startswith("vit_") and spec.weights == "pretrained":
            # Its position table is as long as the images are that the weights were made for.
            side = tv.get_model_weights(spec.name).DEFAULT.meta["min_size"][0]
            extra["image_size"] = sized.pop("image_size", side)
        model: nn.Module = tv.get_model(spec.name, weights=None, **sized, **extra)
        return model
    import timm

    name = embedded_catalogue()[spec.name]["timm_name"] if spec.source == "embedded" else spec.name
    if spec.source == "embedded" and classes is None:
        sized["num_classes"] = embedded_catalogue()[spec.name]["pretrained_classes"]
    built: nn.Module = timm.create_model(name, pretrained=False, **sized)
    return built


@cache
def _sizes(
    source: str, name: str, kwargs: tuple[tuple[str, Any], ...]
) -> tuple[frozenset[str], int]:
    """Return whose shape depends on the number of classes, and how many entries all have."""
    spec = ModelSpec(source=source, name=name, kwargs=dict(kwargs))  # type: ignore[arg-type]

    def shapes(classes: int) -> dict[str, torch.Size]:
        try:
            with torch.device("meta"):
                module = build_module(spec, classes=classes, seed=0)
        except LimberError:
            # Some constructors compute with their own tensors, which meta tensors cannot.
            module = build_module(spec, classes=classes, seed=0)
        return {key: value.shape for key, value in module.state_dict().items()}

    # Two unusual sizes, so that no hidden width equals one of them by chance.
    small, large = shapes(7), shapes(11)
    head = frozenset(key for key in small if small[key] != large.get(key))
    return head, sum(shape.numel() for shape in small.values())


def head_names(spec: ModelSpec) -> frozenset[str]:
    """Return the `state_dict` names whose shape depends on the number of classes."""
    return _sizes(spec.source, spec.name, tuple(sorted(spec.kwargs.items())))[0]


def _check_memory(spec: ModelSpec) -> None:
    """Raise where the network and its weights would not fit into what is free.

    Raises:
        ModelError: They would not. Building it all the same would end this process.
    """
    entries = _sizes(spec.source, spec.name, tuple(sorted(spec.kwargs.items())))[1]
    free = free_memory()
    needed = 4 * entries * (1 if spec.weights == "none" else 2)
    if free is not None and needed > free:
        raise ModelError(
            f"{spec.name} has {entries:,} numbers, which take {in_words(needed)} of memory with "
            f"what is read from a file, and {in_words(free)} are free here. Choose a smaller "
            "network, or a machine with more memory."
        )


def load_model(spec: ModelSpec, *, classes: int | None = None, head_seed: int = 0) -> LoadedModel:
    """Load a network with its weights and, where classes are given, a new head.

    Args:
        spec: From `resolve_model`.
        classes: Number of downstream classes: the head is replaced, also when the pretrained
            one has as many. None keeps the head that came with the weights.
        head_seed: Seed of the new head, and of all weights when there are none to load.

    Returns:
        The network on the CPU, float32, in eval mode, parameters requiring gradients.

    Raises:
        ModelError: Unknown architecture, or weights that do not fit it.
        OfflineError: The weights are not here and cannot be fetched.
    """
    if classes is not None and not 1 <= classes <= 1_000_000:
        raise ModelError(f"A head for {classes} classes cannot be built. Give 1 to 1,000,000.")
    _check_memory(spec)
    head = head_names(spec)
    notes: list[Note] = []
    state: dict[str, Tensor] | None = None
    pretrained_classes: int | None = None
    if spec.weights != "none":
        state = _pretrained_state(spec, notes)
    if state is not None:
        pretrained_classes = _class_count(state, head)
    own_head = classes is None
    if own_head and state is not None and pretrained_classes is not None:
        module = build_module(spec, classes=pretrained_classes, seed=head_seed)
    else:
        module = build_module(spec, classes=classes, seed=head_seed)
    if state is not None:
        _load_state(module, state, spec=spec, head=frozenset() if own_head else head, notes=notes)
    size = _class_count(module.state_dict(), head) or 0
    notes.append(_head_note(spec, pretrained_classes, size, own_head=own_head, seed=head_seed))
    module.eval().requires_grad_(True)
    card = ModelCard(
        spec=spec,
        classes=size,
        own_head=own_head,
        head_seed=head_seed,
        pretrained_classes=pretrained_classes,
        backbone_sha256=state_sha256(module.state_dict(), without=head),
        notes=tuple(notes),
        default_lr=default_lr(module),
        **_describe(spec, module),
    )
    return LoadedModel(module=module, card=card, head=head)


def default_lr(module: nn.Module) -> float:
    """Return the AdamW learning rate at which an untouched network learns in a short run.

    Networks with running statistics bear, and need, a higher rate than transformers. Both rates
    were tried on the embedded models and data; the new head learns `HEAD_LR` in both.
    """
    buffers = (name.rpartition(".")[2] for name, _ in module.named_buffers())
    return LR_WITH_BATCH_NORM if "running_mean" in buffers else LR_WITHOUT


def _head_note(
    spec: ModelSpec, pretrained: int | None, classes: int, *, own_head: bool, seed: int
) -> Note:
    if spec.weights == "none":
        return Note(about="weights", sentence=f"All weights are random (seed {seed}).")
    if own_head:
        said = f"Kept the head that came with the weights ({classes} classes)."
    elif pretrained:
        said = (
            f"Replaced the head of {pretrained} classes by a new one for {classes} (seed {seed})."
        )
    else:
        said = (
            f"The weights came without a head: added a new one for {classes} classes (seed {seed})."
        )
    return Note(about="head", sentence=said)


def _class_count(state: dict[str, Tensor], head: frozenset[str]) -> int | None:
    sizes = [
        int(state[name].shape[0])
        for name in sorted(head)
        if name in state and state[name].ndim >= 1
    ]
    return sizes[-1] if sizes else (0 if head else None)


def _pretrained_state(spec: ModelSpec, notes: list[Note]) -> dict[str, Tensor]:
    if spec.weights == "checkpoint":
        state, said = read_state(Path(str(spec.checkpoint)))
        notes += [Note(about="file", sentence=sentence) for sentence in said]
        plain = build_names(spec)
        state, stripped = without_wrappers(state, plain)
        if stripped:
            prefix = ".".join(part.rstrip(".") for part in stripped)
            notes.append(
                Note(
                    about="file",
                    sentence=f"Stripped the prefix {prefix} from the checkpoint's names.",
                )
            )
        return state
    if spec.source == "embedded":
        return read_checkpoint(ASSETS / "weights" / embedded_catalogue()[spec.name]["file"])
    return _timm_state(spec) if spec.source == "timm" else _torchvision_state(spec)


@cache
def _names_of(source: str, name: str, kwargs: tuple[tuple[str, Any], ...]) -> frozenset[str]:
    spec = ModelSpec(source=source, name=name, kwargs=dict(kwargs))  # type: ignore[arg-type]
    return frozenset(build_module(spec, classes=None, seed=0).state_dict())


def build_names(spec: ModelSpec) -> frozenset[str]:
    """Return the `state_dict` names of the architecture with its own head."""
    return _names_of(spec.source, spec.name, tuple(sorted(spec.kwargs.items())))


def _timm_state(spec: ModelSpec) -> dict[str, Tensor]:
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    config = timm.models.get_pretrained_cfg(spec.name, allow_unregistered=True)
    if config is None or not config.has_weights:
        raise ModelError(f'timm has no pretrained weights for "{spec.name}".', Remedy.OTHER_WEIGHTS)
    what = f'weights of timm model "{spec.name}"'
    if config.hf_hub_id:
        repository = str(config.hf_hub_id)
        files = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
        here = any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)
        if not here:
            require_host(f"{constants.ENDPOINT}/{repository}", what=what, remedy=Remedy.CONNECT)
    elif config.url:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / str(config.url).rsplit("/", 1)[-1]
        if not cached.is_file():
            require_host(str(config.url), what=what, remedy=Remedy.CONNECT)
    try:
        with random_state_kept(0):
            kwargs: dict[str, Any] = dict(spec.kwargs)
            module = timm.create_model(spec.name, pretrained=True, **kwargs)
    except Exception as error:
        raise ModelError(
            f"The {what} cannot be fetched or read: {_first_line(error)}.", Remedy.CONNECT
        ) from error
    return dict(module.state_dict())


def _torchvision_state(spec: ModelSpec) -> dict[str, Tensor]:
    import torchvision.models as tv

    weights = tv.get_model_weights(spec.name).DEFAULT
    what = f'weights of torchvision model "{spec.name}"'
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if not cached.is_file():
        require_host(weights.url, what=what, remedy=Remedy.CONNECT)
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except Exception as error:
        raise ModelError(
            f"The {what} cannot be fetched or read: {_first_line(error)}.", Remedy.CONNECT
        ) from error


def _load_state(
    module: nn.Module,
    state: dict[str, Tensor],
    *,
    spec: ModelSpec,
    head: frozenset[str],
    notes: list[Note],
) -> None:
    convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    target = module.state_dict()
    renamed = not (target.keys() - head <= state.keys())
    resized = any(
        state[name].shape != target[name].shape for name in target.keys() & state.keys() - head
    )
    held, own = state_bytes(state), 4 * sum(value.numel() for value in target.values())
    if held > MOST_STATE * own + SPARE_BYTES:
        raise ModelError(
            f"These weights do not fit {spec.name}: the file has {in_words(held)} of them and the "
            f"model takes {in_words(own)}. Choose the architecture the file was saved from."
        )
    if convert is not None and spec.source != "torchvision" and (renamed or resized):
        try:
            state = dict(convert(dict(state), module))
        except Exception as error:
            raise ModelError(
                f"These weights do not fit {spec.name}: {_first_line(error)}. Check that the "
                "checkpoint belongs to this architecture."
            ) from error
    wanted = target.keys() - head
    missing = sorted(wanted - state.keys())
    # A batch counter is bookkeeping: older files lack it and no prediction depends on it.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    unexpected = sorted(state.keys() - target.keys() - head)
    wrong = sorted(
        name for name in wanted & state.keys() if state[name].shape != target[name].shape
    )
    if wrong:
        name = wrong[0]
        raise ModelError(
            f'These weights do not fit {spec.name}: "{name}" is {tuple(state[name].shape)} in the '
            f"file and {tuple(target[name].shape)} in the model ({len(wrong)} such). Choose the "
            "architecture the file was saved from."
        )
    if missing:
        raise ModelError(
            f"These weights do not fit {spec.name}: {len(missing)} of {len(wanted)} tensors are "
            f'missing, first "{missing[0]}"; the file has "{next(iter(sorted(state)), "")}". '
            "Choose the architecture the file was saved from."
        )
    if unexpected:
        left_out = (
            f"Left out {len(unexpected)} tensors that the model has no place for, "
            f'first "{unexpected[0]}".'
        )
        notes.append(Note(about="file", sentence=left_out))
    kept, cast = fitted_state(state, target, wanted & state.keys(), title=spec.name)
    if cast and spec.weights == "checkpoint":
        stored = f"The checkpoint's weights are stored as {', '.join(cast)}, used as float32."
        notes.append(Note(about="file", sentence=stored))
    module.load_state_dict(kept, strict=False)


def _describe(spec: ModelSpec, module: nn.Module) -> dict[str, Any]:
    if spec.source == "embedded":
        entry = embedded_catalogue()[spec.name]
        return {
            "title": entry["title"],
            "preprocessing": Preprocessing(
                image_size=entry["default_size"],
                interpolation=entry["interpolation"],
                mean=tuple(entry["mean"]),
                std=tuple(entry["std"]),
            ),
            "native_size": entry["native_size"],
            "default_size": entry["default_size"],
            "size_multiple": entry["size_multiple"],
            "licence": entry["licence"],
        }
    if spec.source == "torchvision":
        import torchvision.models as tv

        transform = tv.get_model_weights(spec.name).DEFAULT.transforms()
        native = int(getattr(module, "image_size", 0) or transform.crop_size[0])
        patch = int(getattr(module, "patch_size", 0) or 0)
        fixed = patch > 0
        default = native if fixed else _short_size(spec, module, native=native, multiple=1)
        return {
            "title": spec.name,
            "preprocessing": Preprocessing(
                image_size=default,
                interpolation=transform.interpolation.value,
                mean=tuple(transform.mean),
                std=tuple(transform.std),
            ),
            "native_size": native,
            "default_size": default,
            "size_multiple": native if fixed else 1,
            "licence": None,
        }
    config: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    native = int(config.get("input_size", (3, 224, 224))[-1])
    fixed = bool(config.get("fixed_input_size")) and not spec.kwargs.get("dynamic_img_size")
    patch = _patch_of(module)
    default = native if fixed else _short_size(spec, module, native=native, multiple=patch)
    return {
        "title": spec.name,
        "preprocessing": Preprocessing(
            image_size=default,
            interpolation=str(config.get("interpolation", "bicubic")),
            mean=tuple(config.get("mean", IMAGENET_MEAN)),
            std=tuple(config.get("std", IMAGENET_STD)),
        ),
        "native_size": native,
        "default_size": default,
        "size_multiple": native if fixed else patch,
        "licence": config.get("license"),
    }


def _patch_of(module: nn.Module) -> int:
    """Return the side of the patches a network cuts images into; 1 where it cuts none."""
    sizes = [getattr(getattr(module, "patch_embed", None), "patch_size", None)]
    # Smaller ones further inside are windows, which pad.
    inside = (getattr(part, "patch_size", None) for part in module.modules())
    sizes += [size for size in inside if _side(size) >= SMALLEST_PATCH]
    return max(_side(next((size for size in sizes if size), 1)), 1)


def _side(size: Any) -> int:
    first = size[0] if isinstance(size, tuple | list) and size else size
    return first if isinstance(first, int) else 0


_short_sizes: dict[str, int] = {}


def _short_size(spec: ModelSpec, module: nn.Module, *, native: int, multiple: int) -> int:
    """Return the smallest side of a few, from `SHORT_RUN_SIZE` up, that the network runs on.

    Tried, because no library says which sides its networks take: windows, block attention and
    deep poolings refuse some, each in its own way.
    """
    key = spec.model_dump_json(include={"source", "name", "kwargs"})
    if key not in _short_sizes:
        short = max(SHORT_RUN_SIZE // multiple, 1) * multiple
        larger = {-(-side // multiple) * multiple for side in LARGER_SIZES}
        sides = [short, *sorted(side for side in larger if short < side)]
        fits = (side for side in sides if side < native and _runs(module, side))
        _short_sizes[key] = next(fits, native)
    return _short_sizes[key]


def _runs(module: nn.Module, side: int) -> bool:
    with module_kept(module), memory_kept(module), random_state_kept(0), torch.no_grad():
        # Auxiliary heads only run in training; two images, so that batch norms can.
        for training in (False, True):
            module.train(training)
            try:
                module(torch.zeros(2, 3, side, side))
            except Exception:
                return False
    return True


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")
