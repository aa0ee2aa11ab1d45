"""lightprune: make a Hugging Face causal LM smaller while it trains, as PyTorch Lightning callbacks."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` brings, for type checkers and editors
    from lightprune.anatomy import Anatomy, Family, anatomy_of, register_family
    from lightprune.callbacks.preemption import PreemptionCheckpoint
    from lightprune.callbacks.progress import PruningProgressBar
    from lightprune.callbacks.random_state import RandomState
    from lightprune.callbacks.run_report import RunReport
    from lightprune.compensation import LeastSquaresCompensation
    from lightprune.cut import StructuredCut
    from lightprune.distillation import Distillation
    from lightprune.errors import ConfigError, ExportError
    from lightprune.export import ExportHF, export_hf
    from lightprune.integrations.workers import outlive_preemption
    from lightprune.module import CausalLM
    from lightprune.pipeline import Part, Pipeline, PruningCallback
    from lightprune.plan import PruningPlan
    from lightprune.recovery import LoRARecovery, Recovery
    from lightprune.regularizers import (
        DifferencePenalty,
        GateAnnealing,
        GroupNormPenalty,
        ProximalGroupLasso,
        Regularizer,
        ScaleCalibration,
    )
    from lightprune.reweighting import DomainReweighting
    from lightprune.selectors import (
        ActivationUnitSelector,
        BlockInfluenceSelector,
        GreedyPerplexitySelector,
        HardConcreteSelector,
        LayerGateSelector,
        LayerSelector,
        MagnitudeUnitSelector,
        PlanFromFile,
        ProjectedGateSelector,
        RandomSelector,
        RandomUnitSelector,
        Selector,
        Target,
        TaylorUnitSelector,
        UnitSelector,
    )

__version__ = "0.1.0"

__all__ = [
    "ActivationUnitSelector",
    "Anatomy",
    "BlockInfluenceSelector",
    "CausalLM",
    "ConfigError",
    "DifferencePenalty",
    "Distillation",
    "DomainReweighting",
    "ExportError",
    "ExportHF",
    "Family",
    "GateAnnealing",
    "GreedyPerplexitySelector",
    "GroupNormPenalty",
    "HardConcreteSelector",
    "LayerGateSelector",
    "LayerSelector",
    "LeastSquaresCompensation",
    "LoRARecovery",
    "MagnitudeUnitSelector",
    "Part",
    "Pipeline",
    "PlanFromFile",
    "PreemptionCheckpoint",
    "ProjectedGateSelector",
    "ProximalGroupLasso",
    "PruningCallback",
    "PruningPlan",
    "PruningProgressBar",
    "RandomSelector",
    "RandomState",
    "RandomUnitSelector",
    "Recovery",
    "Regularizer",
    "RunReport",
    "ScaleCalibration",
    "Selector",
    "StructuredCut",
    "Target",
    "TaylorUnitSelector",
    "UnitSelector",
    "anatomy_of",
    "export_hf",
    "outlive_preemption",
    "register_family",
]

# Where each public name is defined. To import one imports torch, Lightning and transformers, so that waits for its use.
_HOMES = {
    name: f"lightprune.{module}"
    for module, names in {
        "anatomy": "Anatomy Family anatomy_of register_family",
        "callbacks.preemption": "PreemptionCheckpoint",
        "callbacks.progress": "PruningProgressBar",
        "callbacks.random_state": "RandomState",
        "callbacks.run_report": "RunReport",
        "compensation": "LeastSquaresCompensation",
        "cut": "StructuredCut",
        "distillation": "Distillation",
        "errors": "ConfigError ExportError",
        "export": "ExportHF export_hf",
        "integrations.workers": "outlive_preemption",
        "module": "CausalLM",
        "pipeline": "Part Pipeline PruningCallback",
        "plan": "PruningPlan",
        "recovery": "LoRARecovery Recovery",
        "regularizers": (
            "DifferencePenalty GateAnnealing GroupNormPenalty ProximalGroupLasso Regularizer ScaleCalibration"
        ),
        "reweighting": "DomainReweighting",
        "selectors": (
            "ActivationUnitSelector BlockInfluenceSelector GreedyPerplexitySelector HardConcreteSelector "
            "LayerGateSelector LayerSelector MagnitudeUnitSelector PlanFromFile ProjectedGateSelector RandomSelector "
            "RandomUnitSelector Selector Target TaylorUnitSelector UnitSelector"
        ),
    }.items()
    for name in names.split()
}


# Modules that are there as attributes only once they are imported: the command line's parser asks every package on the
# way to a command for a name like the command's, and need not wait for them.
_NOT_BY_NAME = ("export", "plan")


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is first asked for (PEP 562)."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif not name.startswith("_") and name not in _NOT_BY_NAME and _has_module(name):
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(f"{__name__}.{name}") is not None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
