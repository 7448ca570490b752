"""What each rule selects and each scheme writes on the vectors' network, from the papers' formulas.

Nothing here comes from `core`: passes are plain torch in float64, and what a channel of this
network consists of is written down by hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import scheme_values
from tests.vectors.network import Network

State = Mapping[str, Tensor]
# Tensor to what is written ("scheme", "fresh", "zero", "one", "scale", "add") to flags.
Selected = dict[str, dict[str, Tensor]]

CONVS = ("blocks.0.conv", "blocks.1.conv", "blocks.2.conv")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# The layers in forward order, without the head.
LAYERS = (
    *("blocks.0.conv", "blocks.0.norm", "blocks.1.conv", "blocks.1.norm"),
    *("blocks.2.conv", "blocks.2.norm", "fc"),
)
ACTIVATION = {
    "blocks.0.conv": "blocks.0.act",
    "blocks.1.conv": "blocks.1.act",
    "blocks.2.conv": "blocks.2.act",
    "fc": "act",
}
# A bias that the norm right behind it takes out again has no gradient but rounding.
WITHOUT_GRADIENT = ("blocks.1.conv.bias",)


@dataclass(frozen=True)
class Pool:
    """Units of one kind: what makes them and what reads them.

    The first two blocks write into one sum, so that channel i of both is one unit.
    """

    units: int
    makers: tuple[str, ...]
    norms: tuple[str, ...]
    readers: tuple[str, ...]


POOLS = (
    Pool(
        6,
        ("blocks.0.conv", "blocks.1.conv"),
        ("blocks.0.norm", "blocks.1.norm"),
        ("blocks.1.conv", "blocks.2.conv"),
    ),
    Pool(8, ("blocks.2.conv",), ("blocks.2.norm",), ("fc",)),
    Pool(10, ("fc",), (), ("head",)),
)
# Where a reader puts the mean that it loses, and with which sign.
TAKERS = {
    "blocks.1.conv": ("blocks.1.conv.bias", 1),
    "blocks.2.conv": ("blocks.2.norm.running_mean", -1),
    "fc": ("fc.bias", 1),
    "head": ("head.bias", 1),
}


def fresh_state(seed: int) -> dict[str, Tensor]:
    """Return the state of a network drawn from a seed as PyTorch's own layers draw it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(Network(3).state_dict())


def stream(seed: int, *labels: str) -> torch.Generator:
    """Return the generator of one purpose: see "How numbers are drawn" in the README."""
    text = "\x1f".join([str(seed), *labels])
    start = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(start)


@dataclass
class Case:
    """The network's weights, its images in the order they are seen, and what they show.

    Attributes:
        state: Weights and buffers.
        batches: Inputs (n, 3, 16, 16) and labels (n,).
        margin: The smallest relative distance between what was selected and what was not, of all
            selections by a limit or rank so far.
    """

    state: State
    batches: Sequence[tuple[Tensor, Tensor]]
    margin: float = float("inf")
    values: dict[str, Tensor] = field(default_factory=dict)

    def network(self) -> nn.Module:
        """Return the network in float64 as it is measured: norms by batch, nothing moves."""
        network = Network(3).double()
        network.load_state_dict(self.state)
        network.eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
                module.momentum = 0.0
        return network

    def passes(self) -> Iterator[tuple[nn.Module, dict[str, Tensor], Tensor]]:
        """Yield the network, what its readers and activations saw and gave, and the mean loss."""
        for inputs, labels in self.batches:
            network = self.network()
            seen: dict[str, Tensor] = {}
            modules = dict(network.named_modules())
            readers = [reader for pool in POOLS for reader in pool.readers]
            for name in (*readers, *ACTIVATION.values()):
                modules[name].register_forward_hook(partial(_note, seen, name))
            loss = F.cross_entropy(network(inputs.double()), labels)
            yield network, seen, loss

    def gradients(self, alpha: float | None = None) -> dict[str, Tensor]:
        """Return the sum of the batches' gradients, or a <- (1 - alpha) a - alpha g."""
        total = {name: torch.zeros_like(each).double() for name, each in self.state.items()}
        for network, _, loss in self.passes():
            loss.backward()
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None
                if alpha is None:
                    total[name] = total[name] + parameter.grad
                else:
                    total[name] = (1 - alpha) * total[name] - alpha * parameter.grad
        return total

    def at_activations(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return h and the gradient of an image's loss at h, each (rows, units)."""
        values, gradients = [], []
        for _, seen, loss in self.passes():
            h = seen[ACTIVATION[layer]]
            (g,) = torch.autograd.grad(loss * len(h), h)
            for rows, part in ((values, h.detach()), (gradients, g)):
                rows.append(part.movedim(1, -1).reshape(-1, h.shape[1]))
        return torch.cat(values), torch.cat(gradients)

    def inputs_of(self, reader: str) -> Tensor:
        """Return what a reader reads, all images together."""
        return torch.cat([seen[f"{reader}:in"].detach() for _, seen, _ in self.passes()])

    # Selections.

    def lowest(self, utility: Tensor, percent: float) -> Tensor:
        """Return flags of the int(percent / 100 n) lowest entries."""
        flat = utility.flatten()
        order = flat.argsort()
        count = int(percent / 100 * len(flat))
        flags = torch.zeros(len(flat), dtype=torch.bool)
        flags[order[:count]] = True
        if 0 < count < len(flat):
            self._apart(float(flat[order[count - 1]]), float(flat[order[count]]))
        return flags.reshape(utility.shape)

    def at_most(self, values: Tensor, limit: float) -> Tensor:
        """Return flags of values that do not exceed a limit."""
        flags = values <= limit
        for value in values.flatten().tolist():
            self._apart(value, limit)
        return flags

    def _apart(self, left: float, right: float) -> None:
        self.margin = min(self.margin, abs(left - right) / max(abs(left), abs(right), 1e-30))

    # Rules over single weights.

    def _own(self, layers: Sequence[str]) -> list[str]:
        names = [name for name, _ in Network(3).named_parameters()]
        return [name for name in names if name.rpartition(".")[0] in layers]

    def seed_paper(self, percent: float, *, by_gradient: bool) -> Selected:
        """Coetzer et al.: the lowest of each matrix get the scheme, those of each bias 0."""
        gradients = self.gradients() if by_gradient else {}
        found: Selected = {}
        for name in self._own((*LAYERS, "head")):
            old = self.state[name].double()
            if old.ndim < 2 and not name.endswith("bias"):
                continue
            if by_gradient and name in WITHOUT_GRADIENT:
                continue
            utility = (old * gradients[name]).abs() if by_gradient else old.abs()
            write = "scheme" if old.ndim > 1 else "zero"
            found[name] = {write: self.lowest(utility, percent)}
        return found

    def swr(self, percent: float, threshold: float | None, utility: str, seed: int) -> Selected:
        """Hernandez-Garcia et al.: the lowest of each parameter, or those below the mean's part."""
        gradients = self.gradients() if utility == "gradient" else {}
        found: Selected = {}
        for name in self._own(LAYERS):
            old = self.state[name].double()
            if utility == "gradient" and name in WITHOUT_GRADIENT:
                continue
            if utility == "gradient":
                values = (old * gradients[name]).abs()
            elif utility == "magnitude":
                values = old.abs()
            else:
                values = torch.rand(old.shape, generator=stream(seed, "swr", name)).double()
            if threshold is None:
                found[name] = {"scheme": self.lowest(values, percent)}
            else:
                found[name] = {"scheme": self.at_most(values, threshold * float(values.mean()))}
        return found

    def random(self, percent: float, seed: int) -> Selected:
        """As many entries of each matrix and kernel, each as likely."""
        found: Selected = {}
        for name in self._own(LAYERS):
            old = self.state[name]
            if old.ndim > 1:
                count = int(percent / 100 * old.numel())
                places = torch.randperm(old.numel(), generator=stream(seed, "random", name))
                found[name] = {"scheme": _flags(old, places[:count])}
        return found

    def random_weights(self, matched: Selected, seed: int) -> Selected:
        """As many entries of each tensor as another selection has."""
        found: Selected = {}
        for name, writes in matched.items():
            for write, flags in writes.items():
                noise = stream(seed, "random", name, write)
                places = torch.randperm(flags.numel(), generator=noise)
                found[name] = {write: _flags(flags, places[: int(flags.sum())])}
        return found

    # Rules over units. A selection of units is a set of numbers for each pool.

    def units(self, chosen: Sequence[Collection[int]], *, mean_stays: bool = False) -> Selected:
        """Return what belongs to units: makers are redrawn, readers cut, the rest made neutral."""
        found: Selected = {}

        def note(name: str, write: str, places: Collection[int], axis: int) -> None:
            if not places:
                return
            flags = torch.zeros(self.state[name].shape, dtype=torch.bool)
            flags.index_fill_(axis, torch.tensor(sorted(places)), True)
            writes = found.setdefault(name, {})
            writes[write] = writes.get(write, torch.zeros_like(flags)) | flags

        for pool, units in zip(POOLS, chosen, strict=True):
            for maker in pool.makers:
                note(f"{maker}.weight", "scheme", units, 0)
                if f"{maker}.bias" in self.state:
                    note(f"{maker}.bias", "zero", units, 0)
            for norm in pool.norms:
                for name, write in (
                    *(("weight", "one"), ("bias", "zero")),
                    *(("running_mean", "zero"), ("running_var", "one")),
                ):
                    note(f"{norm}.{name}", write, units, 0)
            for reader in pool.readers:
                note(f"{reader}.weight", "zero", units, 1)
        if mean_stays:
            self._shift(chosen, found)
        return found

    def _shift(self, chosen: Sequence[Collection[int]], found: Selected) -> None:
        """Add what readers lose: their mean output with the units minus that without them."""
        made = {
            maker: units for pool, units in zip(POOLS, chosen, strict=True) for maker in pool.makers
        }
        for pool, units in zip(POOLS, chosen, strict=True):
            for reader in pool.readers if units else ():
                x = self.inputs_of(reader)
                without = x.index_fill(1, torch.tensor(sorted(units)), 0)
                module = dict(self.network().named_modules())[reader]
                with torch.no_grad():
                    lost = (module(x) - module(without)).movedim(1, -1)
                gain = lost.reshape(-1, lost.shape[-1]).mean(0)
                # A unit that is itself reset gains nothing.
                gain[sorted(made.get(reader, ()))] = 0
                taker, sign = TAKERS[reader]
                self.values[taker] = sign * gain
                found.setdefault(taker, {})["add"] = torch.ones_like(gain, dtype=torch.bool)

    def figures(self, of: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Return each pool's figures of h and g; a sum is as lively as its livelier part."""
        return [
            torch.stack([of(*self.at_activations(layer)) for layer in pool.makers]).amax(0)
            for pool in POOLS
        ]

    def contributions(self) -> list[Tensor]:
        """Dohare et al.: mean |outgoing weight| times mean |input|, over all that read a unit."""
        found = []
        for pool in POOLS:
            total = torch.zeros(pool.units, dtype=torch.float64)
            for reader in pool.readers:
                x = self.inputs_of(reader).movedim(1, -1).flatten(0, -2).abs().mean(0)
                weight = self.state[f"{reader}.weight"].double()
                total += weight.movedim(1, -1).flatten(0, -2).abs().mean(0) * x
            found.append(total)
        return found

    def least(self, scores: Sequence[Tensor], percent: float) -> list[set[int]]:
        return [_where(self.lowest(each, percent)) for each in scores]

    def dormant(self, scores: Sequence[Tensor], tau: float) -> list[set[int]]:
        return [_where(self.at_most(each, tau)) for each in scores]

    def shrunken(self, limit: float, twin: State) -> list[set[int]]:
        """Units all of whose rows are below so much of the fresh twin's, by L2 norm."""
        found = []
        for pool in POOLS:
            ratios = [
                self.state[f"{maker}.weight"].double().flatten(1).norm(dim=1)
                / twin[f"{maker}.weight"].double().flatten(1).norm(dim=1)
                for maker in pool.makers
            ]
            for each in ratios:
                self.at_most(each, limit)
            found.append(_where(torch.stack([each < limit for each in ratios]).all(0)))
        return found

    def random_units(self, matched: Sequence[Collection[int]], seed: int) -> list[set[int]]:
        found = []
        for pool, units in zip(POOLS, matched, strict=True):
            noise = stream(seed, "random units", *pool.makers)
            found.append(set(torch.randperm(pool.units, generator=noise)[: len(units)].tolist()))
        return found

    # Whole layers.

    def layers(self, names: Collection[str], *, statistics: bool, biases_alone: bool) -> Selected:
        """Return whole layers; a convolution takes the statistics of its norm along."""
        found: Selected = {}
        for layer in names:
            for name in self._own((layer,)):
                if not biases_alone or name.endswith("bias"):
                    everything = torch.ones(self.state[name].shape, dtype=torch.bool)
                    found[name] = {"scheme": everything}
            norm = layer.replace("conv", "norm")
            for buffer in BUFFERS if statistics and norm.startswith("blocks") else ():
                flags = torch.ones(self.state[f"{norm}.{buffer}"].shape, dtype=torch.bool)
                found[f"{norm}.{buffer}"] = {"fresh": flags}
        return found

    def beyond(self, limit: float) -> list[str]:
        """Return the layers whose largest parameter has an L2 norm above a limit."""
        norms = {name: float(self.state[f"{name}.weight"].double().norm()) for name in LAYERS}
        for value in norms.values():
            self._apart(value, limit)
        return [name for name, value in norms.items() if value > limit]

    def dash(self, selected: Selected, alpha: float, floor: float) -> Selected:
        """Shin et al.: multiply by the cosine between weight and direction, at least `floor`."""
        direction = self.gradients(alpha)
        for name in selected:
            old = self.state[name].double()
            axes = {1: (0,), 2: (1,), 4: (2, 3)}[old.ndim]
            dot = (old * direction[name]).sum(axes, keepdim=True)
            lengths = [
                each.pow(2).sum(axes, keepdim=True).sqrt() for each in (old, direction[name])
            ]
            # Without a gradient there is no direction, and the cosine is 0.
            cosine = (dot / (lengths[0] * lengths[1])).nan_to_num(0.0)
            self.values[name] = cosine.clamp(floor, 1)
        return {name: {"scale": writes["scheme"]} for name, writes in selected.items()}

    # Values.

    def written(
        self,
        selected: Selected,
        *,
        scheme: str,
        numbers: Mapping[str, float],
        seed: int,
        twin: State,
    ) -> dict[str, Tensor]:
        """Return each written tensor as it is afterwards.

        What is drawn and multiplied comes first, then the twin's values and ones, then zeros,
        then what is added; each write looks at the weights from before.
        """
        after = {}
        for name, writes in selected.items():
            old = self.state[name]
            now = old.double()
            for write in ("scheme", "scale", "fresh", "one", "zero", "add"):
                if write not in writes:
                    continue
                if write == "scheme":
                    whole = bool(writes[write].all())
                    new = scheme_values(
                        scheme,
                        old,
                        twin[name],
                        stream(seed, scheme, name),
                        numbers=numbers,
                        bias=name.endswith("bias"),
                        selected=None if whole else writes[write],
                    )
                elif write == "scale":
                    new = old.double() * self.values[name]
                elif write == "add":
                    new = now + self.values[name]
                else:
                    new = {
                        "fresh": twin[name].double(),
                        "one": torch.ones_like(now),
                        "zero": torch.zeros_like(now),
                    }[write]
                now = torch.where(writes[write], new.double(), now)
            after[name] = now.to(old.dtype)
        return after


def _note(
    seen: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Tensor], out: Tensor
) -> None:
    seen[f"{name}:in"], seen[name] = args[0], out


def _flags(like: Tensor, places: Tensor) -> Tensor:
    flags = torch.zeros(like.numel(), dtype=torch.bool)
    flags[places] = True
    return flags.reshape(like.shape)


def _where(flags: Tensor) -> set[int]:
    return set(flags.nonzero().flatten().tolist())
