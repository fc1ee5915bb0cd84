"""Sparse codes and the few hot operations on them."""

from sae_kit.ops.codes import Codes, SparseCodes, decode, firing_counts, l0, to_dense, widen

__all__ = ["Codes", "SparseCodes", "decode", "firing_counts", "l0", "to_dense", "widen"]
