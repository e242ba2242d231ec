"""Training: the LightningModule, its parameter groups and schedules."""

from repnet.training.classifier import Classifier
from repnet.training.objectives import Distillation, RDrop, Supervised, rdrop_loss
from repnet.training.parameter_groups import repvgg_parameter_groups
from repnet.training.schedules import warmup_cosine

__all__ = [
    "Classifier",
    "Distillation",
    "RDrop",
    "Supervised",
    "rdrop_loss",
    "repvgg_parameter_groups",
    "warmup_cosine",
]
