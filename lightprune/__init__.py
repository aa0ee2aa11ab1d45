"""lightprune: make a Hugging Face causal LM smaller while it trains, as PyTorch Lightning callbacks."""

from lightprune.anatomy import Anatomy, Family, anatomy_of
from lightprune.cut import StructuredCut
from lightprune.errors import ConfigError
from lightprune.pipeline import Pipeline
from lightprune.plan import PruningPlan
from lightprune.recovery import Recovery
from lightprune.regularizers import DifferencePenalty, GateAnnealing
from lightprune.selectors import (
    BlockInfluenceSelector,
    GreedyPerplexitySelector,
    LayerGateSelector,
    PlanFromFile,
    RandomSelector,
)

__version__ = "0.1.0"
