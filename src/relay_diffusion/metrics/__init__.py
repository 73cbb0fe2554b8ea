"""Measures of generated images: Inception features, distances to a reference set, and the published protocols."""

from relay_diffusion.metrics.base import Measure
from relay_diffusion.metrics.evaluator import Evaluator
from relay_diffusion.metrics.frechet import FIDMeasure, FrechetDistance, SFIDMeasure
from relay_diffusion.metrics.inception import Inception, InceptionFeatures
from relay_diffusion.metrics.inception_score import InceptionScore, InceptionScoreMeasure
from relay_diffusion.metrics.kid import KIDMeasure
from relay_diffusion.metrics.precision_recall import PrecisionRecallMeasure
from relay_diffusion.metrics.protocol import EvaluationProtocol
from relay_diffusion.metrics.reference import Reference
from relay_diffusion.metrics.reference_source import ReferenceSource

__all__ = [
    "EvaluationProtocol",
    "Evaluator",
    "FIDMeasure",
    "FrechetDistance",
    "Inception",
    "InceptionFeatures",
    "InceptionScore",
    "InceptionScoreMeasure",
    "KIDMeasure",
    "Measure",
    "PrecisionRecallMeasure",
    "Reference",
    "ReferenceSource",
    "SFIDMeasure",
]
