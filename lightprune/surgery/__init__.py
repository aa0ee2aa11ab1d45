"""Pure surgery: (model, plan) to a smaller model, and the optimizers that trained it to ones that train the rest."""

from lightprune.surgery.expected import expected_parameters
from lightprune.surgery.model import Rows, cut_model, kept_rows, sliced
from lightprune.surgery.optimizer import drop_empty_groups, remove_parameters, replace_parameter
from lightprune.surgery.optimizer_check import check_groups_hold_all, check_optimizer
from lightprune.surgery.shapes import parameters_in_shape, resulting_parameters, resulting_shapes

__all__ = [
    "Rows",
    "check_groups_hold_all",
    "check_optimizer",
    "cut_model",
    "drop_empty_groups",
    "expected_parameters",
    "kept_rows",
    "parameters_in_shape",
    "remove_parameters",
    "replace_parameter",
    "resulting_parameters",
    "resulting_shapes",
    "sliced",
]
