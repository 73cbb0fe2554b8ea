"""Metrics of generated images: Inception features, Fréchet distances, evaluation against a reference set."""

from relay_diffusion.metrics.evaluation import Evaluation, ReferenceStatistics
from relay_diffusion.metrics.frechet import FrechetDistance
from relay_diffusion.metrics.inception import Inception, InceptionFeatures
from relay_diffusion.metrics.inception_score import InceptionScore
from relay_diffusion.metrics.precision_recall import PrecisionRecall

__all__ = [
    "Evaluation",
    "FrechetDistance",
    "Inception",
    "InceptionFeatures",
    "InceptionScore",
    "PrecisionRecall",
    "ReferenceStatistics",
]
