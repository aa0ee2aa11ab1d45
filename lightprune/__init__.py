"""lightprune: make a Hugging Face causal LM smaller while it trains, as PyTorch Lightning callbacks."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` brings, for type checkers and editors
    from lightprune.anatomy import Anatomy, Family, anatomy_of
    from lightprune.cut import StructuredCut
    from lightprune.errors import ConfigError
    from lightprune.export import ExportHF, export_hf
    from lightprune.module import CausalLM
    from lightprune.pipeline import Pipeline
    from lightprune.plan import PruningPlan
    from lightprune.preemption import PreemptionCheckpoint
    from lightprune.progress import PruningProgressBar
    from lightprune.random_state import RandomState
    from lightprune.recovery import LoRARecovery, Recovery
    from lightprune.regularizers import DifferencePenalty, GateAnnealing, GroupNormPenalty, ProximalGroupLasso
    from lightprune.report import RunReport
    from lightprune.reweighting import DomainReweighting
    from lightprune.selectors import (
        ActivationUnitSelector,
        BlockInfluenceSelector,
        GreedyPerplexitySelector,
        HardConcreteSelector,
        LayerGateSelector,
        MagnitudeUnitSelector,
        PlanFromFile,
        RandomSelector,
        RandomUnitSelector,
        TaylorUnitSelector,
    )

__version__ = "0.1.0"

__all__ = [
    "ActivationUnitSelector",
    "Anatomy",
    "BlockInfluenceSelector",
    "CausalLM",
    "ConfigError",
    "DifferencePenalty",
    "DomainReweighting",
    "ExportHF",
    "Family",
    "GateAnnealing",
    "GreedyPerplexitySelector",
    "GroupNormPenalty",
    "HardConcreteSelector",
    "LayerGateSelector",
    "LoRARecovery",
    "MagnitudeUnitSelector",
    "Pipeline",
    "PlanFromFile",
    "PreemptionCheckpoint",
    "ProximalGroupLasso",
    "PruningPlan",
    "PruningProgressBar",
    "RandomSelector",
    "RandomState",
    "RandomUnitSelector",
    "Recovery",
    "RunReport",
    "StructuredCut",
    "TaylorUnitSelector",
    "anatomy_of",
    "export_hf",
]

# Where each public name is defined. To import one imports torch, Lightning and transformers, so that waits for its use.
_HOMES = {
    name: f"lightprune.{module}"
    for module, names in {
        "anatomy": "Anatomy Family anatomy_of",
        "cut": "StructuredCut",
        "errors": "ConfigError",
        "export": "ExportHF export_hf",
        "module": "CausalLM",
        "pipeline": "Pipeline",
        "plan": "PruningPlan",
        "preemption": "PreemptionCheckpoint",
        "progress": "PruningProgressBar",
        "random_state": "RandomState",
        "recovery": "LoRARecovery Recovery",
        "regularizers": "DifferencePenalty GateAnnealing GroupNormPenalty ProximalGroupLasso",
        "report": "RunReport",
        "reweighting": "DomainReweighting",
        "selectors": (
            "ActivationUnitSelector BlockInfluenceSelector GreedyPerplexitySelector HardConcreteSelector "
            "LayerGateSelector MagnitudeUnitSelector PlanFromFile RandomSelector RandomUnitSelector TaylorUnitSelector"
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
