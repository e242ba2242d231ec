"""Training: the LightningModule, its parameter groups and schedules."""

from repnet.training.activation_checkpointing import checkpoint_activations
from repnet.training.auxiliary_heads import AuxiliaryHeads
from repnet.training.classifier import Classifier
from repnet.training.learning_rate import describe_scaling, scaled_learning_rate
from repnet.training.losses import BinaryCrossEntropy, CrossEntropy, FocalLoss
from repnet.training.mix import Mix
from repnet.training.objectives import Distillation, RDrop, Supervised, rdrop_loss
from repnet.training.parameter_groups import (
    all_decay,
    layerwise_parameter_groups,
    no_norm_or_bias_decay,
    parameter_table,
    repvgg_parameter_groups,
    scale_learning_rates,
)
from repnet.training.schedules import (
    constant,
    one_cycle,
    warmup_cosine,
    warmup_exponential,
    warmup_linear,
    warmup_step,
)
from repnet.training.teacher import load_teacher

__all__ = [
    "AuxiliaryHeads",
    "BinaryCrossEntropy",
    "Classifier",
    "CrossEntropy",
    "Distillation",
    "FocalLoss",
    "Mix",
    "RDrop",
    "Supervised",
    "all_decay",
    "checkpoint_activations",
    "constant",
    "describe_scaling",
    "layerwise_parameter_groups",
    "load_teacher",
    "no_norm_or_bias_decay",
    "one_cycle",
    "parameter_table",
    "rdrop_loss",
    "repvgg_parameter_groups",
    "scale_learning_rates",
    "scaled_learning_rate",
    "warmup_cosine",
    "warmup_exponential",
    "warmup_linear",
    "warmup_step",
]
