"""The families that lightprune ships, one small declaration each."""

from lightprune.anatomy.base import Family
from lightprune.anatomy.families.gemma import GEMMA2, GEMMA3
from lightprune.anatomy.families.gpt2 import GPT2
from lightprune.anatomy.families.gpt_neox import GPT_NEOX
from lightprune.anatomy.families.llama import LLAMA
from lightprune.anatomy.families.mixture import MIXTRAL, QWEN3_MOE
from lightprune.anatomy.families.olmo2 import OLMO2
from lightprune.anatomy.families.opt import OPT
from lightprune.anatomy.families.phi import PHI
from lightprune.anatomy.families.phi3 import PHI3
from lightprune.anatomy.families.starcoder2 import ARCEE, STARCODER2

FAMILIES: tuple[Family, ...] = (
    ARCEE,
    LLAMA,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    MIXTRAL,
    OLMO2,
    OPT,
    PHI,
    PHI3,
    QWEN3_MOE,
    STARCODER2,
)
