"""Evaluation: what every number means, and one pass over held-out rows that computes them all.

Sums, counts and moments are accumulated in float64 and divided once at the end, so no number depends on batch size,
on the order of batches or on which other SAEs are in the pass. An undefined value is None.
"""

from sae_kit.evals.capacity import capacity
from sae_kit.evals.family import FAMILIES, EvalStep, Family, Metrics, check_families, family
from sae_kit.evals.fidelity import Fidelity, FidelityStep
from sae_kit.evals.moments import Moments, Sums
from sae_kit.evals.reconstruction import Reconstruction
from sae_kit.evals.runner import EvalReport, evaluate
from sae_kit.evals.sparsity import Sparsity

__all__ = [
    "FAMILIES",
    "EvalReport",
    "EvalStep",
    "Family",
    "Fidelity",
    "FidelityStep",
    "Metrics",
    "Moments",
    "Reconstruction",
    "Sparsity",
    "Sums",
    "capacity",
    "check_families",
    "evaluate",
    "family",
]
