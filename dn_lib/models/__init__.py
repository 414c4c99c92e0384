"""Chapter 6: language models, pure or hybrid, from one small configuration.

>>> import dn_lib, torch
>>> from dn_lib.models import LanguageModel, ModelConfig, generate
>>> config = ModelConfig(width=32, layers=4, heads=2, hybrid="window", window=16)
>>> config.mixers()
('delta', 'window', 'delta', 'window')
>>> model = LanguageModel(config)
>>> generate(model, torch.zeros(1, 3, dtype=torch.long), 5).shape
torch.Size([1, 8])
"""

from dn_lib.models.cache import Cache
from dn_lib.models.config import HYBRIDS, LARGEST_SIZE, LARGEST_WINDOW, MIXERS, ModelConfig, check_config
from dn_lib.models.files import CONFIG, WEIGHTS, load_model, save_model, unwrapped
from dn_lib.models.generation import LONGEST, generate
from dn_lib.models.language_model import Block, LanguageModel, build_mixer, check_in_vocabulary
from dn_lib.models.liger import to_liger
from dn_lib.models.mimetic import mimetic_initialisation
from dn_lib.models.wrappers import WRAPPERS, inner, plain_name

__all__ = [
    "CONFIG",
    "HYBRIDS",
    "LARGEST_SIZE",
    "LARGEST_WINDOW",
    "LONGEST",
    "MIXERS",
    "WEIGHTS",
    "WRAPPERS",
    "Block",
    "Cache",
    "LanguageModel",
    "ModelConfig",
    "build_mixer",
    "check_config",
    "check_in_vocabulary",
    "generate",
    "inner",
    "load_model",
    "mimetic_initialisation",
    "plain_name",
    "save_model",
    "to_liger",
    "unwrapped",
]
