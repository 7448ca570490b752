"""Attention: which calls compute it, and how evenly each head spreads it over the keys.

Fused attention never shows its weights. They are computed again here, for a few queries of each
image alone: the entropy is a mean over queries, and a sample of them is enough for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

# `F.multi_head_attention_forward` hides its projections: keys are projected again for one image
# in so many.
MHA_EVERY = 4

_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One computation of attention, with batch entries and heads on axes 0 and 1.

    Attributes:
        query: (batch, heads, queries, width), or None where `weights` are at hand.
        key: (batch, heads, keys, width), or None.
        mask: Added to the scores, broadcast to (batch, heads, queries, keys); None for none.
        causal: Whether later keys are hidden from earlier queries.
        scale: Factor of the scores.
        weights: (batch, heads, queries, keys) after the softmax, where they are at hand.
        every: Only every so many-th batch entry is there.
        entries: How many batch entries there were before that; None for those that are there.
        heads_apart: Whether axis 1 counts the heads. Otherwise they share an axis with windows or
            images, and only means over heads can be told.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    scale: float = 1.0
    weights: Tensor | None = None
    every: int = 1
    entries: int | None = None
    heads_apart: bool = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch entries, heads, queries, keys."""
        if self.weights is not None:
            batch, heads, queries, keys = self.weights.shape
        else:
            assert self.query is not None
            assert self.key is not None
            batch, heads, queries, _ = self.query.shape
            keys = self.key.shape[2]
        return batch, heads, queries, keys

    def first(self, entries: int) -> Attention:
        """Return the attention of the first batch entries."""
        mask = self.mask
        if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
            mask = mask[:entries]
        return replace(
            self,
            query=None if self.query is None else self.query[:entries],
            key=None if self.key is None else self.key[:entries],
            weights=None if self.weights is None else self.weights[:entries],
            mask=mask,
            entries=None,
        )

    def weights_of(self, chosen: Int[Tensor, "batch few"]) -> Float[Tensor, "batch head few key"]:
        """Return the attention of the chosen queries, (batch, heads, few, keys) float32.

        Args:
            chosen: (batch, few) positions of queries, an own choice for each batch entry.
        """
        return self._spread(chosen)[0]

    def _spread(self, chosen: Int[Tensor, "batch few"]) -> tuple[Tensor, Tensor]:
        """Return the attention of the chosen queries, and how many keys each may see."""
        batch, heads, queries, keys = self.shape
        few = chosen.shape[1]
        place = chosen[:, None, :, None]
        # Under autocast a product of half-precision queries and keys would overflow before it is
        # scaled, which the fused kernels do not.
        with torch.no_grad(), torch.autocast(chosen.device.type, enabled=False):
            if self.weights is not None:
                p = self.weights.gather(2, place.expand(batch, heads, few, keys)).float()
                return p, torch.full_like(p[..., 0], keys)
            assert self.query is not None
            assert self.key is not None
            index = place.expand(batch, heads, few, self.query.shape[3])
            picked = self.query.gather(2, index).float()
            scores = (picked @ self.key.transpose(-2, -1).float()) * self.scale
            if self.mask is not None:
                whole = self.mask.expand(batch, heads, queries, keys)
                scores = scores + whole.gather(2, place.expand(batch, heads, few, keys))
            if self.causal:
                hidden = torch.arange(keys, device=scores.device) > place
                scores = scores.masked_fill(hidden, -math.inf)
            # What is not a number is seen, and shows.
            return scores.softmax(-1), (scores != -math.inf).sum(-1).float()

    def entropy(
        self, chosen: Int[Tensor, "batch few"]
    ) -> tuple[Float[Tensor, "batch head few"], Bool[Tensor, "batch head few"]]:
        """Return the entropy of the chosen queries' attention over its largest possible value.

        Args:
            chosen: (batch, few) positions of queries, an own choice for each batch entry.

        Returns:
            float32 in [0, 1], 0 where one key gets everything, 1 where all that may be seen get
            the same; and whether the query has a choice at all. One that sees fewer than two
            keys, as the first does under a causal mask, has none; its entropy is given as 0.
        """
        with torch.no_grad(), torch.autocast(chosen.device.type, enabled=False):
            p, seen = self._spread(chosen)
            chooses = seen > 1
            entropy = -torch.xlogy(p, p).sum(-1)
            return torch.where(chooses, entropy / seen.log(), 0.0), chooses


def _heads_second(tensor: Tensor, heads: int | None) -> Tensor:
    """Return it with four axes: batch entries, heads, and the last two.

    Networks put windows before or behind the heads; the axis that counts as many as the module
    says it has heads is theirs.
    """
    if tensor.ndim == 3:
        return tensor.unsqueeze(1)
    if tensor.ndim == 4:
        return tensor
    behind = tensor.ndim - 3
    places = [place for place in range(behind, 0, -1) if tensor.shape[place] == heads]
    turned = tensor.movedim(places[0], behind) if places else tensor
    return turned.flatten(0, tensor.ndim - 4)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        zero = torch.zeros(mask.shape, dtype=torch.float32, device=like.device)
        return zero.masked_fill(~mask, -math.inf)
    return mask.float()


def _fused(args: tuple[Any, ...], kwargs: Mapping[str, Any], heads: int | None) -> Attention | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    if query.ndim < 3:
        return None
    scale = given.get("scale")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if query.ndim > 3 and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    if mask is not None:
        mask = _added(mask, query)
        if mask.ndim > 2:
            lead = query.shape[:-2]
            mask = _heads_second(mask.expand(*lead, *mask.shape[-2:]), heads)
        elif mask.ndim < 2:
            return None
    query, key = _heads_second(query.detach(), heads), _heads_second(key.detach(), heads)
    return Attention(
        query=query,
        key=key,
        mask=None if mask is None else mask.detach(),
        causal=bool(given.get("is_causal", False)),
        scale=float(scale),
        heads_apart=heads in (None, query.shape[1]),
    )


def _multi_head(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Attention | None:
    names = (
        "query",
        "key",
        "value",
        "embed_dim_to_check",
        "num_heads",
        "in_proj_weight",
        "in_proj_bias",
        "bias_k",
        "bias_v",
        "add_zero_attn",
    )
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    query, key, heads = given["query"], given["key"], int(given["num_heads"])
    packed, bias = given["in_proj_weight"], given["in_proj_bias"]
    odd = (
        given.get("attn_mask"),
        given.get("key_padding_mask"),
        given.get("bias_k"),
        given.get("static_k"),
        given.get("add_zero_attn") or None,
    )
    if packed is None or query.ndim != 3 or any(option is not None for option in odd):
        return None
    width = query.shape[-1]
    with torch.no_grad():
        # (positions, batch, width) to (batch, heads, positions, width of a head).
        projected = []
        for i, tokens in enumerate((query, key)):
            part = slice(i * width, (i + 1) * width)
            some = tokens.detach()[:, ::MHA_EVERY]
            made = F.linear(some, packed[part], None if bias is None else bias[part])
            projected.append(
                made.unflatten(-1, (heads, width // heads)).permute(1, 2, 0, 3).detach()
            )
    return Attention(
        query=projected[0],
        key=projected[1],
        causal=bool(given.get("is_causal", False)),
        scale=(width // heads) ** -0.5,
        every=MHA_EVERY,
        entries=query.shape[1],
    )


def _softmax(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, heads: int | None
) -> Attention | None:
    scores = args[0] if args else kwargs.get("input")
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(scores, Tensor) or scores.ndim < 4 or dim not in (-1, scores.ndim - 1):
        return None
    # One key is no choice; one query of one head is a weighting of something else.
    if scores.shape[-1] < 2:
        return None
    weights = _heads_second(result.detach(), heads)
    return Attention(weights=weights, heads_apart=heads in (None, weights.shape[1]))


def attention_of(
    function: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    result: Any,
    *,
    heads: int | None = None,
) -> Attention | None:
    """Return what attention a finished call computed, or None where it computed none.

    Known are `F.scaled_dot_product_attention`, `F.multi_head_attention_forward` without masks,
    and a softmax over the last axis of a tensor of four axes or more.

    Args:
        function: What was called.
        args: Of the call.
        kwargs: Of the call.
        result: What it gave.
        heads: How many heads the module says it has, where it says so.
    """
    if function is F.scaled_dot_product_attention:
        return _fused(args, kwargs, heads)
    if function is F.multi_head_attention_forward:
        return _multi_head(args, kwargs)
    if function in _SOFTMAX:
        return _softmax(args, kwargs, result, heads)
    return None
