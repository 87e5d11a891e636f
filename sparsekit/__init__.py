"""A trained PyTorch network and a budget in; a physically smaller, verified, measured network out."""

from sparsekit.acceleration import accelerate
from sparsekit.artifact import Artifact, load
from sparsekit.budget import Budget
from sparsekit.compaction import certify, compact
from sparsekit.errors import SparsekitError
from sparsekit.export import export_onnx
from sparsekit.graph import ChannelGraph, trace
from sparsekit.latency import measure_latency
from sparsekit.models import MODELS
from sparsekit.pipeline import compress
from sparsekit.plan import PruningPlan
from sparsekit.pruners import PRUNERS
from sparsekit.recipe import Recipe
from sparsekit.surgery import mask
from sparsekit.task import Task
from sparsekit.tidy import tidy
from sparsekit.training import fit

__all__ = [
    "MODELS",
    "PRUNERS",
    "Artifact",
    "Budget",
    "ChannelGraph",
    "PruningPlan",
    "Recipe",
    "SparsekitError",
    "Task",
    "accelerate",
    "certify",
    "compact",
    "compress",
    "export_onnx",
    "fit",
    "load",
    "mask",
    "measure_latency",
    "tidy",
    "trace",
]
