"""The families that lightprune ships, one small declaration each."""

from lightprune.anatomy.base import Family
from lightprune.anatomy.families.gemma import GEMMA2, GEMMA3
from lightprune.anatomy.families.gpt2 import GPT2
from lightprune.anatomy.families.gpt_neox import GPT_NEOX
from lightprune.anatomy.families.llama import LLAMA
from lightprune.anatomy.families.mixture import MIXTRAL, QWEN3_MOE
from lightprune.anatomy.families.multimodal import GEMMA3_WITH_VISION, LLAVA, QWEN2_5_VL
from lightprune.anatomy.families.olmo2 import OLMO2
from lightprune.anatomy.families.opt import OPT
from lightprune.anatomy.families.phi import PHI
from lightprune.anatomy.families.phi3 import PHI3
from lightprune.anatomy.families.starcoder2 import ARCEE, STARCODER2

FAMILIES: tuple[Family, ...] = (
    ARCEE,
    LLAMA,
    LLAVA,
    GEMMA2,
    GEMMA3,
    GEMMA3_WITH_VISION,
    GPT2,
    GPT_NEOX,
    MIXTRAL,
    OLMO2,
    OPT,
    PHI,
    PHI3,
    QWEN2_5_VL,
    QWEN3_MOE,
    STARCODER2,
)
