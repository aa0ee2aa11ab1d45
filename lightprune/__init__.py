"""lightprune: make a Hugging Face causal LM smaller while it trains, as PyTorch Lightning callbacks."""

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
