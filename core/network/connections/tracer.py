"""One traced pass in which every entry of every activation carries the unit it belongs to."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from core.errors import PlanError
from core.network.connections.wiring import COPIES, NOBODY, Connections, Mix, Owned, Role, Tracked
from core.network.hooks import memory_kept, module_kept
from core.seeding import random_state_kept

Labels = np.ndarray

# Operations that only move entries about: they are run on the labels with the same arguments.
MOVES = frozenset(
    {
        "view",
        "_unsafe_view",
        "_reshape_alias",
        "reshape",
        "permute",
        "transpose",
        "t",
        "expand",
        "slice",
        "select",
        "cat",
        "stack",
        "split",
        "split_with_sizes",
        "unsafe_split",
        "chunk",
        "unbind",
        "clone",
        "contiguous",
        "squeeze",
        "unsqueeze",
        "roll",
        "flip",
        "index",
        "index_select",
        "repeat",
        "detach",
        "alias",
        "lift_fresh_copy",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "unfold",
        "narrow",
        "movedim",
        "diagonal",
        "constant_pad_nd",
    }
)
# Of an output, only its form: what follows acts on the output itself.
FORMS = COPIES | {"view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose"}
FORMS |= {"unsqueeze", "squeeze", "movedim"}
# Operations that mix neighbours in space but keep every channel to itself.
SPATIAL = frozenset(
    {
        "max_pool2d_with_indices",
        "avg_pool2d",
        "_adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
        "reflection_pad2d",
        "replication_pad2d",
    }
)
REDUCTIONS = frozenset(
    {"mean", "sum", "amax", "amin", "var", "std", "var_mean", "max", "min", "linalg_vector_norm"}
)
SCANS = frozenset({"_softmax", "_log_softmax", "_safe_softmax", "cumsum"})
# Entry by entry, though torch does not tag them so.
POINTWISE = frozenset({"hardswish", "hardsigmoid"})
ATTENTION = "_scaled_dot_product"
SUMS = frozenset({"add", "sub", "rsub"})
PRODUCTS = frozenset({"mul", "div"})


@dataclass(frozen=True, slots=True)
class _Computed:
    """A tensor made from parameters by arithmetic: no entry of it is an entry of a parameter."""

    name: str


def connections_of(module: nn.Module, inputs: Tensor) -> Connections:
    """Trace a network once and return how its units hang together. The network is left as it was.

    Args:
        module: On the CPU.
        inputs: An example (1, 3, height, width).

    Raises:
        PlanError: The network cannot be traced.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    plain = {name: value.detach() for name, value in state.items()}

    def run(given: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(module, given, (x,))

    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fused encoder of nn.TransformerEncoder hides which weight does what.
        torch.backends.mha.set_fastpath_enabled(False)
        with module_kept(module), memory_kept(module), random_state_kept(0), torch.no_grad():
            module.eval()
            graph = make_fx(functionalize(run), tracing_mode="real")(plain, inputs)
            tracer = _Tracer(graph, tuple(plain))
            tracer.run(*plain.values(), inputs)
    except PlanError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PlanError(
            f"The network's connections cannot be traced ({first[:160]}), so its units cannot be "
            "reset one by one. Reset whole layers or single weights."
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return tracer.connections()


@dataclass(slots=True)
class _Ties:
    """Labels made so far, and which of them are one."""

    count: int = 0
    pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    births: list[tuple[int, str, Any, Any]] = field(default_factory=list)
    blocked: list[tuple[np.ndarray, str]] = field(default_factory=list)
    mixed: list[tuple[int, str]] = field(default_factory=list)

    def new(self, kind: str, first: Any, second: Any, count: int) -> np.ndarray:
        start = self.count
        self.count += count
        self.births.append((start, kind, first, second))
        return np.arange(start, start + count)

    def tie(self, left: np.ndarray, right: np.ndarray) -> None:
        left, right = np.broadcast_arrays(left, right)
        keep = (left != NOBODY) & (right != NOBODY) & (left != right)
        if keep.any():
            pairs = np.unique(np.stack([left[keep], right[keep]]), axis=1)
            self.pairs.append((pairs[0], pairs[1]))

    def block(self, labels: np.ndarray, reason: str) -> None:
        known = np.unique(labels[labels != NOBODY])
        if len(known):
            self.blocked.append((known, reason))

    def together(self, labels: Labels, axes: Sequence[int], what: str) -> Labels:
        """Tie the labels along some axes and return the labels with these axes of length 1."""
        axes = tuple(axis % labels.ndim for axis in axes)
        if all(labels.shape[axis] == 1 for axis in axes):
            return labels
        one: np.ndarray = labels.max(axis=axes, keepdims=True)
        self.tie(labels, one)
        known = one[one != NOBODY]
        if len(known):
            self.mixed.append((int(known.flat[0]), what))
        return one

    def combined(self, left: Labels, right: Labels, kind: str) -> Labels:
        """Tie two labels entry by entry; the result is a new unit of the same bundle."""
        left, right = np.broadcast_arrays(left, right)
        both = (left != NOBODY) & (right != NOBODY) & (left != right)
        result = np.where(left == NOBODY, right, left)
        if both.any():
            pairs, inverse = np.unique(
                np.stack([left[both], right[both]]), axis=1, return_inverse=True
            )
            fresh = self.new(kind, pairs[0], pairs[1], pairs.shape[1])
            self.pairs += [(pairs[0], fresh), (pairs[1], fresh)]
            result[both] = fresh[inverse.reshape(-1)]
        return _narrow(result)


def _narrow(labels: np.ndarray) -> Labels:
    """Return labels with every axis along which they do not change of length 1."""
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1:
            first = labels.take([0], axis=axis)
            if (labels == first).all():
                labels = first
    return labels


def operation(target: Any) -> str:
    """Return the name of an operation of a graph, whatever its overload, in place or not."""
    return str(getattr(target, "overloadpacket", target)).removeprefix("aten.").rstrip("_")


def _nodes_of(arguments: Any) -> list[fx.Node]:
    """Return the nodes in the arguments of an operation, as often as they are in them."""
    nodes: list[fx.Node] = []
    fx.node.map_arg(arguments, nodes.append)
    return nodes


def _of_one_parameter(mark: Any) -> bool:
    """Whether a mark is that of entries that were only moved about."""
    return isinstance(mark[0] if isinstance(mark, list) and mark else mark, Tracked)


def _as_tensor(labels: Labels, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.broadcast_to(labels, tuple(shape)).copy())


class _Tracer(fx.Interpreter):
    """Runs the graph and, beside each value, its labels."""

    def __init__(self, graph: fx.GraphModule, names: Sequence[str]) -> None:
        super().__init__(graph)
        self._places = iter([*names, None])
        self._marks: dict[fx.Node, Any] = {}
        self._ties = _Ties()
        self._mixes: list[Mix] = []
        # The outputs that nothing has been done with but to give them another form.
        self._bare: dict[fx.Node, Mix] = {}
        self._vectors: list[Owned] = []
        self._uses: list[Tracked] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation on values and on labels."""
        value = super().run_node(n)
        if n.op == "placeholder":
            name = next(self._places)
            self._marks[n] = (
                np.full((1,) * value.ndim, NOBODY)
                if name is None
                else Tracked(name, tuple(value.shape))
            )
        elif n.op == "call_function":
            before = len(self._mixes)
            self._marks[n] = self._marked(n, value)
            if len(self._mixes) > before:
                # What a factor scales is no output as the weights alone make it.
                if n.kwargs.get("alpha", 1) == 1:
                    self._bare[n] = self._mixes[-1]
            elif n.args and operation(n.target) in FORMS:
                self._keep_bare(n, n.args[0])
        if n.op == "output" or not _of_one_parameter(self._marks.get(n)):
            for source in _nodes_of((n.args, n.kwargs)):
                mark = self._marks.get(source)
                marks = mark if isinstance(mark, list) else [mark]
                self._uses += [each for each in marks if isinstance(each, Tracked)]
        if n.op == "output":
            for source in n.all_input_nodes:
                mark = self._marks.get(source)
                if isinstance(mark, np.ndarray):
                    self._ties.block(mark, "its units are the network's outputs")
        return value

    def _keep_bare(self, n: fx.Node, given: Any) -> None:
        mix = self._alone(given)
        if mix is not None:
            self._bare[n] = mix

    def _alone(self, given: Any) -> Mix | None:
        """Return what made an output that goes nowhere else, if nothing came between."""
        if not isinstance(given, fx.Node) or len(given.users) > 1:
            return None
        return self._bare.get(given)

    def _mark(self, given: Any) -> Any:
        return self._marks.get(given) if isinstance(given, fx.Node) else None

    def _value(self, given: Any) -> Any:
        return self.env[given] if isinstance(given, fx.Node) else given

    def _marked(self, n: fx.Node, value: Any) -> Any:  # noqa: PLR0911 - one line a family
        args: Any = n.args
        target: Any = n.target
        if target is operator.getitem:
            marks = self._mark(args[0])
            return marks[args[1]] if isinstance(marks, list | tuple) else marks
        marks = [self._marks.get(source) for source in n.all_input_nodes]
        if all(mark is None for mark in marks):
            return None
        name = operation(target)
        if not any(isinstance(mark, np.ndarray | list) for mark in marks):
            return self._of_parameters(n, name, value, marks)
        handler = getattr(self, f"_op_{name.strip('_')}", None)
        if handler is not None:
            return handler(n, value)
        if name.startswith(ATTENTION):
            return self._attention(n, value)
        if name in MOVES:
            return self._moved(n, name, value)
        if name == "_to_copy" or (name == "as_strided" and value.shape == self._shape(args[0])):
            return self._mark(args[0])
        if name in SPATIAL:
            labels = self._labels(args[0])
            return self._spread(self._ties.together(labels, (-1, -2), f"by {name}"), value)
        if name in REDUCTIONS:
            return self._reduced(n, name, value)
        if name in SCANS:
            return self._ties.together(self._labels(args[0]), (args[1],), "by a softmax over them")
        if name in POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ()):
            return self._pointwise(n, name)
        return self._unknown(n, name, value)

    def _shape(self, given: Any) -> torch.Size:
        shape: torch.Size = self._value(given).shape
        return shape

    def _labels(self, given: Any) -> Labels:
        mark = self._mark(given)
        if isinstance(mark, np.ndarray):
            return mark
        value = self._value(given)
        return np.full((1,) * (value.ndim if isinstance(value, Tensor) else 0), NOBODY)

    def _spread(self, labels: Labels, value: Any) -> Any:
        return [labels] * len(value) if isinstance(value, tuple | list) else labels

    def _of_parameters(self, n: fx.Node, name: str, value: Any, marks: Sequence[Any]) -> Any:
        known = next(mark for mark in marks if mark is not None)
        source = n.args[0] if n.args else None
        single = isinstance(known, Tracked) and self._mark(source) is known
        if single and name == "_to_copy":
            return known
        if single and len(n.all_input_nodes) == 1 and name in MOVES and isinstance(value, Tensor):
            target, rest, named = n.target, n.args[1:], dict(n.kwargs)

            def move(entries: Tensor) -> Tensor:
                moved: Tensor = target(entries, *rest, **named)  # type: ignore[operator]
                return moved

            return Tracked(known.name, known.shape, (*known.moves, (name, move)))
        if single and isinstance(value, tuple | list) and name in MOVES:
            return [self._piece(n, name, known, place) for place in range(len(value))]
        if isinstance(known, list):
            known = known[0]
        return self._spread(_Computed(known.name), value)  # type: ignore[arg-type]

    def _piece(self, n: fx.Node, name: str, known: Tracked, place: int) -> Tracked:
        target, rest, named = n.target, n.args[1:], dict(n.kwargs)

        def move(entries: Tensor) -> Tensor:
            moved: Tensor = target(entries, *rest, **named)[place]  # type: ignore[operator]
            return moved

        return Tracked(known.name, known.shape, (*known.moves, (name, move)))

    def _moved(self, n: fx.Node, name: str, value: Any) -> Any:
        source, *rest = n.args
        if any(
            isinstance(mark, np.ndarray) and (mark != NOBODY).any()
            for mark in map(self._mark, _nodes_of(rest))
        ):
            # What is taken depends on units, and no label says so.
            return self._unknown(n, name, value)

        def labelled(given: Any) -> Any:
            if isinstance(given, list | tuple):
                return [labelled(part) for part in given]
            return _as_tensor(self._labels(given), self._shape(given))

        rest = [fx.node.map_arg(part, self._value) for part in rest]
        if name == "constant_pad_nd":
            rest = [rest[0], NOBODY]
        moved = n.target(labelled(source), *rest, **n.kwargs)  # type: ignore[operator]
        if isinstance(moved, tuple | list):
            return [_narrow(part.numpy()) for part in moved]
        return _narrow(moved.numpy())

    def _reduced(self, n: fx.Node, name: str, value: Any) -> Any:
        labels = self._labels(n.args[0])
        place = 2 if name == "linalg_vector_norm" else 1
        axes: Any = n.args[place] if len(n.args) > place else n.kwargs.get("dim")
        if isinstance(axes, fx.Node):
            return self._unknown(n, name, value)
        if axes is None:
            axes = tuple(range(labels.ndim))
        axes = (axes,) if isinstance(axes, int) else tuple(axes) or tuple(range(labels.ndim))
        one = self._ties.together(labels, axes, f"by a {name} over them")
        first = value[0] if isinstance(value, tuple | list) else value
        if first.ndim < one.ndim:
            one = one.squeeze(tuple(axis % one.ndim for axis in axes))
        return self._spread(one, value)

    def _pointwise(self, n: fx.Node, name: str) -> Any:
        labels: Labels | None = None
        for given in n.all_input_nodes:
            mark = self._mark(given)
            if not isinstance(mark, np.ndarray):
                continue
            if labels is None:
                labels = mark
            else:
                labels = self._ties.combined(labels, mark, "sum" if name in SUMS else "product")
        assert labels is not None
        for given in n.all_input_nodes:
            mark = self._mark(given)
            if isinstance(mark, Tracked) and name in SUMS | PRODUCTS:
                self._own(mark, labels, "shift" if name in SUMS else "scale")
                if name in ("add", "sub") and not n.kwargs:
                    self._added(n, name, given, labels)
        return labels

    def _added(self, n: fx.Node, name: str, given: fx.Node, labels: Labels) -> None:
        """Note what an operation of its own adds to an output, or takes off it, as a bias does."""
        mix = self._alone(n.args[0] if given is n.args[1] or name == "sub" else n.args[1])
        if mix is None or mix.bias is not None or not np.array_equal(labels.ravel(), mix.makes):
            return
        # Counted from the last axis, as both are when they are added.
        shape = self._shape(given)
        own = [axis - len(shape) for axis, length in enumerate(shape) if length > 1]
        along = [axis - labels.ndim for axis, length in enumerate(labels.shape) if length > 1]
        if own == along and int(np.prod(shape)) == len(mix.makes):
            if name == "add":
                mix.bias = self._mark(given)
            else:
                mix.mean = self._mark(given)

    def _own(self, parameter: Tracked, owners: np.ndarray, role: Role) -> None:
        self._vectors.append(Owned(parameter, owners, role))

    def _unknown(self, n: fx.Node, name: str, value: Any) -> Any:
        ties = self._ties
        found = [self._mark(node) for node in n.all_input_nodes]
        flat = [
            each.ravel()
            for mark in found
            for each in (mark if isinstance(mark, list) else [mark])
            if isinstance(each, np.ndarray)
        ]
        labels = np.concatenate(flat)
        known = labels[labels != NOBODY]
        label = NOBODY
        if len(known):
            one = ties.together(known, (0,), f"by the operation {name}")
            ties.block(one, f"they go through {name}, of which it is not known what reads what")
            label = int(one.flat[0])

        def spread(each: Any) -> Any:
            return np.full((1,) * each.ndim, label) if isinstance(each, Tensor) else None

        return [spread(v) for v in value] if isinstance(value, tuple | list) else spread(value)

    # Operations with weights, by name.

    def _weighted(
        self,
        labels: np.ndarray,
        weight: Any,
        *,
        outputs: int,
        in_axis: int,
        out_axis: int,
        groups: int = 1,
    ) -> np.ndarray:
        """Return labels (outputs,) of what a weight makes of the labels (inputs,) it reads."""
        mark = self._mark(weight)
        if not isinstance(mark, Tracked):
            name = mark.name if isinstance(mark, _Computed) else "another activation"
            made = self._ties.new("leaf", "", outputs, outputs)
            why = f"a weight that is computed from {name} stands beside them"
            self._ties.block(made, why)
            self._ties.block(labels, why)
            return made
        layer = mark.name.rpartition(".")[0] or mark.name
        made = self._ties.new("leaf", layer, outputs, outputs)
        channelwise = groups > 1 and groups == len(labels)
        if channelwise:
            # One input each: the channel goes on, and its one weight must not become zero.
            self._ties.tie(np.repeat(labels, outputs // groups), made)
        self._mixes.append(Mix(mark, labels, made, in_axis, out_axis, groups, channelwise))
        return made

    def _op_convolution(self, n: fx.Node, value: Tensor) -> Labels:
        source, weight, bias = n.args[0], n.args[1], n.args[2]
        transposed, groups = bool(n.args[6]), int(n.args[8])  # type: ignore[arg-type]
        labels = self._labels(source)
        others = tuple(axis for axis in range(labels.ndim) if axis != 1)
        labels = self._ties.together(labels, others, "by a convolution over places")
        inputs = self._shape(source)[1]
        flat = np.broadcast_to(labels.reshape(-1), (inputs,))
        if transposed and groups > 1:
            made = self._ties.new("leaf", "", value.shape[1], value.shape[1])
            for mark in (flat, made):
                self._ties.block(mark, "a grouped transposed convolution stands beside them")
        else:
            made = self._weighted(
                flat,
                weight,
                outputs=value.shape[1],
                in_axis=0 if transposed else 1,
                out_axis=1 if transposed else 0,
                groups=groups,
            )
        self._biased(bias, made)
        return made.reshape((1, -1) + (1,) * (value.ndim - 2))

    def _biased(self, bias: Any, made: np.ndarray) -> None:
        mark = self._mark(bias)
        if isinstance(mark, Tracked):
            self._own(mark, made, "bias")
            mix = self._mixes[-1] if self._mixes else None
            if mix is not None and np.array_equal(mix.makes, made):
                mix.bias = mark if self._shape(bias) == made.shape else None

    def _op_addmm(self, n: fx.Node, value: Tensor) -> Labels:
        before = len(self._mixes)
        made = self._product(n.args[1], n.args[2], value)
        mark = self._mark(n.args[0])
        if isinstance(mark, np.ndarray):
            return self._ties.combined(made, mark, "sum")
        plain = n.kwargs.get("alpha", 1) == n.kwargs.get("beta", 1) == 1
        if plain and len(self._mixes) > before:
            self._biased(n.args[0], made.reshape(-1))
        elif isinstance(mark, Tracked):
            # The units own it, but what it adds to them is not what a product of theirs loses.
            self._own(mark, made, "bias")
        return made

    def _op_mm(self, n: fx.Node, value: Tensor) -> Labels:
        return self._product(n.args[0], n.args[1], value)

    def _product(self, left: Any, right: Any, value: Tensor) -> Labels:
        if not isinstance(self._mark(right), Tracked | _Computed):
            return self._contracted(self._labels(left), self._labels(right))
        labels = self._ties.together(self._labels(left), (0,), "by a product over places")
        flat = np.broadcast_to(labels.reshape(-1), (self._shape(left)[1],))
        made = self._weighted(flat, right, outputs=value.shape[1], in_axis=0, out_axis=1)
        return made.reshape(1, -1)

    def _op_bmm(self, n: fx.Node, value: Tensor) -> Labels:
        for given in n.args[:2]:
            if isinstance(self._mark(given), Tracked | _Computed):
                return self._unknown(n, "a product with a batch of weights", value)
        return self._contracted(self._labels(n.args[0]), self._labels(n.args[1]))

    def _op_baddbmm(self, n: fx.Node, value: Tensor) -> Labels:
        for given in n.args[1:3]:
            if isinstance(self._mark(given), Tracked | _Computed):
                return self._unknown(n, "a product with a batch of weights", value)
        made = self._contracted(self._labels(n.args[1]), self._labels(n.args[2]))
        mark = self._mark(n.args[0])
        return self._ties.combined(made, mark, "sum") if isinstance(mark, np.ndarray) else made

    def _contracted(self, left: Labels, right: Labels) -> Labels:
        """Labels (..., m, k) times (..., k, n): what is summed over is one."""
        both = "by a product of two activations"
        rows = self._ties.together(left, (-1,), both)
        columns = self._ties.together(right, (-2,), both)
        return self._ties.combined(rows, columns, "product")

    def _attention(self, n: fx.Node, value: Any) -> Any:
        queries, keys, values = (self._labels(argument) for argument in n.args[:3])
        heads = queries.shape[-3:-2] if queries.ndim > 2 else ()
        if keys.ndim > 2 and keys.shape[-3] not in (1, *heads) and queries.shape[-3] != 1:
            return self._unknown(n, "attention with grouped queries", value)
        scores = self._contracted(queries, np.swapaxes(keys, -1, -2))
        made = self._contracted(scores, values)
        if not isinstance(value, tuple | list):
            return made
        return [made, *[None] * (len(value) - 1)]

    def _op_native_batch_norm(self, n: fx.Node, value: Any) -> Any:
        labels = self._labels(n.args[0])
        others = tuple(axis for axis in range(labels.ndim) if axis != 1)
        labels = self._ties.together(labels, others, "by a norm over places")
        roles: tuple[Role, ...] = ("norm_scale", "norm_shift", "norm_mean", "norm_var")
        for given, role in zip(n.args[1:5], roles, strict=True):
            mark = self._mark(given)
            if isinstance(mark, Tracked):
                self._own(mark, labels.reshape(-1), role)
        mix, mean = self._alone(n.args[0]), self._mark(n.args[3])
        if mix is not None and isinstance(mean, Tracked):
            mix.mean = mean if np.array_equal(labels.ravel(), mix.makes) else None
        return self._spread(labels, value)

    _op_native_batch_norm_legit_no_training = _op_native_batch_norm
    _op_cudnn_batch_norm = _op_native_batch_norm
    _op_batch_norm_with_update = _op_native_batch_norm

    def _op_native_layer_norm(self, n: fx.Node, _: Any) -> Any:
        labels = self._labels(n.args[0])
        axes = range(-len(n.args[1]), 0)  # type: ignore[arg-type]
        known = self._mark(n.args[2])
        name = known.name.rpartition(".")[0] if isinstance(known, Tracked) else "a layer norm"
        one = self._ties.together(labels, tuple(axes), f'by the norm "{name}"')
        return [one, None, None]

    def _op_native_group_norm(self, n: fx.Node, _: Any) -> Any:
        shape, groups = self._shape(n.args[0]), int(n.args[6])  # type: ignore[arg-type]
        labels = self._labels(n.args[0])
        others = tuple(axis for axis in range(labels.ndim) if axis != 1)
        flat = self._ties.together(labels, others, "by a norm over places").reshape(-1)
        grouped = np.broadcast_to(flat, (shape[1],)).reshape(groups, -1)
        self._ties.together(grouped, (1,), "by a group norm")
        for given, role in zip(n.args[1:3], ("norm_scale", "norm_shift"), strict=True):
            mark = self._mark(given)
            if isinstance(mark, Tracked):
                self._own(mark, grouped.reshape(-1), role)  # type: ignore[arg-type]
        made = grouped.reshape((1, -1) + (1,) * (len(shape) - 2))
        return [made, None, None]

    def connections(self) -> Connections:
        """Return what was found."""
        ties = self._ties
        self._tie_uses()
        if ties.pairs:
            left = np.concatenate([pair[0] for pair in ties.pairs])
            right = np.concatenate([pair[1] for pair in ties.pairs])
        else:
            left = right = np.empty(0, dtype=np.int64)
        size = max(ties.count, 1)
        graph = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(size, size))
        of = connected_components(graph, directed=False)[1].astype(np.int64)
        bundles: dict[str, np.ndarray] = {}
        whole: dict[int, str] = {}
        mixed = {int(of[label]): what for label, what in reversed(ties.mixed)}
        for mix in self._mixes:
            layer = mix.parameter.name.rpartition(".")[0] or mix.parameter.name
            found = of[mix.makes]
            before = bundles.get(layer)
            if before is not None and len(before) != len(found):
                for bundle in {*before.tolist(), *found.tolist()}:
                    whole[bundle] = f'"{layer}" is used in more than one way'
                continue
            bundles[layer] = found
            if len(np.unique(found)) == 1:
                how = mixed.get(int(found[0]), "by how the network is built")
                whole[int(found[0])] = f"its units cannot be told apart, being tied {how}"
        reasons = {int(of[label]): why for labels, why in ties.blocked for label in labels}
        return Connections(
            bundles=bundles,
            reasons={**whole, **reasons},
            _of=of,
            _mixes=tuple(self._mixes),
            _vectors=tuple(self._vectors),
            _uses=tuple(self._uses),
            _births=tuple(ties.births),
        )

    def _tie_uses(self) -> None:
        """Tie the units of a weight that is used more than once: its rows are reset once."""
        by_name: dict[str, list[Mix]] = {}
        for mix in self._mixes:
            by_name.setdefault(mix.parameter.name, []).append(mix)
        for name, uses in by_name.items():
            first = uses[0]
            for other in uses[1:]:
                alike = (
                    other.makes.shape == first.makes.shape
                    and other.reads.shape == first.reads.shape
                    and (other.in_axis, other.groups) == (first.in_axis, first.groups)
                    and np.array_equal(other.parameter.entries(), first.parameter.entries())
                )
                if alike:
                    self._ties.tie(first.makes, other.makes)
                    self._ties.tie(first.reads, other.reads)
                elif len(np.intersect1d(first.parameter.entries(), other.parameter.entries())):
                    for mix in (first, other):
                        why = f'"{name}" is used in more than one way'
                        self._ties.block(mix.makes, why)
                        self._ties.block(mix.reads, why)
