"""Pure surgery: (model, plan) to a smaller model, and the optimizers that trained it to ones that train the rest."""

from lightprune.surgery.model import cut_model
from lightprune.surgery.optimizer import remove_parameters

__all__ = ["cut_model", "remove_parameters"]
