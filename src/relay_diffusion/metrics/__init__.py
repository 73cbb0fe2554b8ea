"""Measures of generated images: Inception features, distances to a reference set, and the published protocols."""

from relay_diffusion.metrics.evaluation import Evaluation
from relay_diffusion.metrics.fid import FIDMeasure
from relay_diffusion.metrics.frechet import FrechetDistance
from relay_diffusion.metrics.inception import Inception, InceptionFeatures
from relay_diffusion.metrics.inception_score import InceptionScore, InceptionScoreMeasure
from relay_diffusion.metrics.kid import KIDMeasure
from relay_diffusion.metrics.measure import Measure
from relay_diffusion.metrics.precision_recall import PrecisionRecall, PrecisionRecallMeasure
from relay_diffusion.metrics.protocol import EvaluationProtocol
from relay_diffusion.metrics.reference import Reference
from relay_diffusion.metrics.reference_source import ReferenceSource
from relay_diffusion.metrics.sfid import SFIDMeasure

__all__ = [
    "Evaluation",
    "EvaluationProtocol",
    "FIDMeasure",
    "FrechetDistance",
    "Inception",
    "InceptionFeatures",
    "InceptionScore",
    "InceptionScoreMeasure",
    "KIDMeasure",
    "Measure",
    "PrecisionRecall",
    "PrecisionRecallMeasure",
    "Reference",
    "ReferenceSource",
    "SFIDMeasure",
]
