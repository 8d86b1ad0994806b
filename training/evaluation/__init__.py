"""Measures predictions against the truth; the commands `evaluate` and `submission` of `cspine-train` call it.

Door: what is named here, for trainings that want a number on the way. No torch, no network.
"""

from model.levels import OUTPUTS
from training.evaluation.loss import log_losses, weighted_log_loss
from training.evaluation.ranking import average_precision, roc_auc
from training.evaluation.tables import InputError

__all__ = ["OUTPUTS", "InputError", "average_precision", "log_losses", "roc_auc", "weighted_log_loss"]
