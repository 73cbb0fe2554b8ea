"""Metrics of generated images.

Inception features, distances to a reference set, published protocols.
"""

from relay_diffusion.metrics.base import FeatureMetric, ImageMetric
from relay_diffusion.metrics.evaluator import Evaluator
from relay_diffusion.metrics.frechet import FIDMetric, FrechetDistance, SFIDMetric
from relay_diffusion.metrics.inception import Inception, InceptionFeatures
from relay_diffusion.metrics.inception_score import InceptionScore, InceptionScoreMetric
from relay_diffusion.metrics.kid import KIDMetric
from relay_diffusion.metrics.precision_recall import PrecisionRecallMetric
from relay_diffusion.metrics.protocol import Protocol
from relay_diffusion.metrics.reference import Reference
from relay_diffusion.metrics.reference_source import ReferenceSource

__all__ = [
    "Evaluator",
    "FIDMetric",
    "FeatureMetric",
    "FrechetDistance",
    "ImageMetric",
    "Inception",
    "InceptionFeatures",
    "InceptionScore",
    "InceptionScoreMetric",
    "KIDMetric",
    "PrecisionRecallMetric",
    "Protocol",
    "Reference",
    "ReferenceSource",
    "SFIDMetric",
]
