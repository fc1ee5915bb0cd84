"""The two sums that all sparse products are made of, and the two products with their gradients.

Entries lie in bags. `gather_sum` adds up weighted rows of a matrix bag by bag, `gather_dot` multiplies the row of a bag
with a row of a matrix, entry by entry. With bags = rows of a batch the first one decodes; with the same entries sorted
by latent it is a weight gradient; the second one is the gradient of the values. Nothing of the size entries × width is
made, and every result is summed in an order that is always the same.

Two implementations: the embedding bags of torch, and Triton kernels (`triton_sums.py`) on CUDA.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae_kit.ops.layout import Groups, Layout, grouped

HAS_TRITON = find_spec("triton") is not None  # asked once: torch.compile cannot follow a search for modules


def gather_sum(
    values: Float[Tensor, " entries"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " bags_plus_1"],
    rows: Float[Tensor, "n d"],
) -> Float[Tensor, "bags d"]:
    """Σ over the entries e of each bag of values[e] · rows[indices[e]]; an empty bag gives 0."""
    if _has_kernels(rows):
        from sae_kit.ops import triton_sums

        return triton_sums.gather_sum(values, indices, offsets, rows)
    weights = values.to(rows.dtype)  # the kernels take any
    return F.embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def gather_dot(
    left: Float[Tensor, "bags d"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " bags_plus_1"],
    rows: Float[Tensor, "n d"],
) -> Float[Tensor, " entries"]:
    """⟨left[bag of e], rows[indices[e]]⟩ of every entry e."""
    if _has_kernels(rows):
        from sae_kit.ops import triton_sums

        return triton_sums.gather_dot(left, indices, offsets, rows)
    nothing = indices.new_empty(0)  # torch then finds the bag of each entry itself
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return backward(left.to(rows.dtype), rows, indices, offsets[:-1], nothing, 0, -1)


def decode(values: Float[Tensor, " entries"], W: Float[Tensor, "latents d"], layout: Layout) -> Float[Tensor, "bags d"]:
    """Codes · W of entries and decoder rows, with gradients to both."""
    trains = W.requires_grad and torch.is_grad_enabled()
    by_latent = _read_by(layout.by_latent, layout.bag) if trains else _Reads()
    return _Decode.apply(values, W, layout.indices, layout.offsets, *by_latent)  # pyright: ignore


def encode(
    picked: Float[Tensor, " entries"],
    x: Float[Tensor, "sources d"],
    W: Float[Tensor, "latents d"],
    bias: Float[Tensor, " latents"],
    b_dec: Float[Tensor, " d"] | None,
    layout: Layout,
    source: Int[Tensor, " entries"],
) -> Float[Tensor, " entries"]:
    """Pre-activations of chosen entries, (x − b_dec) W + bias, which have been computed: here they get their gradient.

    `picked` are the values, `source` says which row of x each entry reads; b_dec is None where the encoder does not
    subtract it.
    """
    if not torch.is_grad_enabled():
        return picked
    by_latent = _read_by(layout.by_latent, source)
    by_source = _read_by(grouped(source, len(x)), layout.indices) if x.requires_grad else _Reads()
    return _Encode.apply(picked, x, W, bias, b_dec, layout.indices, *by_latent, *by_source)  # pyright: ignore


def _has_kernels(rows: Tensor) -> bool:
    """Whether Triton's kernels take these rows."""
    return rows.is_cuda and HAS_TRITON


class _Reads(NamedTuple):
    """Entries sorted into groups, and which row of a matrix each of them multiplies."""

    order: Int[Tensor, " entries"] | None = None
    offsets: Int[Tensor, " groups_plus_1"] | None = None
    rows: Int[Tensor, " entries"] | None = None


def _read_by(groups: Groups, rows: Int[Tensor, " entries"]) -> _Reads:
    return _Reads(groups.order, groups.offsets, rows[groups.order])


class _Decode(torch.autograd.Function):
    """Tensors alone go in, so that torch.compile can follow; likewise below. It may be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W: Tensor, indices: Tensor, offsets: Tensor, *by_latent: Any) -> Tensor:
        ctx.save_for_backward(values, W, indices, offsets, *by_latent)
        return gather_sum(values, indices, offsets, W)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, W, indices, offsets, order, latent_offsets, bags = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable(grads[0], values, W, indices, offsets), None, None, None, None, None
        grad = grads[0].contiguous()
        to_values = to_W = None
        if ctx.needs_input_grad[0]:
            to_values = gather_dot(grad, indices, offsets, W).to(values.dtype)
        if ctx.needs_input_grad[1]:
            to_W = gather_sum(values[order], bags, latent_offsets, grad).to(W.dtype)
        return to_values, to_W, None, None, None, None, None


def _differentiable(grad: Tensor, values: Tensor, W: Tensor, indices: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a decoder in operations with a graph, for second derivatives: entries × width numbers."""
    bags = torch.arange(len(grad), device=grad.device).repeat_interleave(offsets.diff(), output_size=len(indices))
    rows = grad[bags]
    return (rows * W[indices]).sum(dim=1), torch.zeros_like(W).index_put((indices,), values[:, None] * rows, True)


class _Encode(torch.autograd.Function):
    """Differentiated once: only training comes here, in use pre-activations have a graph of their own."""

    @staticmethod
    def forward(
        ctx: Any, picked: Tensor, x: Tensor, W: Tensor, bias: Tensor, b_dec: Tensor | None, *layout: Any
    ) -> Tensor:
        ctx.save_for_backward(x, W, bias, b_dec, *layout)
        return picked.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # without a graph of its own a second derivative would be 0, silently
            raise RuntimeError(
                "the sparse encoder of training is differentiated once, found create_graph=True; sae(u) has second "
                "derivatives"
            )
        x, W, bias, b_dec, indices, order, offsets, sources, x_order, x_offsets, latents = ctx.saved_tensors
        grad = grads[0]
        to_x = to_W = to_b_dec = None
        wide = torch.promote_types(grad.dtype, torch.float32)
        to_bias = torch.zeros(len(bias), dtype=wide, device=bias.device)
        # Not index_add_: on CUDA the order of its sums varies.
        to_bias.index_put_((indices,), grad.to(wide), accumulate=True)
        if ctx.needs_input_grad[1]:
            to_x = gather_sum(grad[x_order], latents, x_offsets, W).to(x.dtype)
        if ctx.needs_input_grad[2]:
            to_W = gather_sum(grad[order], sources, offsets, x if b_dec is None else x - b_dec).to(W.dtype)
        if b_dec is not None and ctx.needs_input_grad[4]:
            to_b_dec = -(to_bias.to(W.dtype) @ W).to(b_dec.dtype)
        return None, to_x, to_W, to_bias.to(bias.dtype), to_b_dec, *[None] * 7
