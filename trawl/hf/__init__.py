"""Factored checkpoints in transformers: modules that multiply by factors, the loading plug-in, and ``load``.

Importing this package registers ``quant_method: trawl``, so that ``AutoModel….from_pretrained`` knows such folders.
"""

from trawl.hf.factor_stack import FactorStack
from trawl.hf.linear import FactoredLinear
from trawl.hf.load import check_folder, load
from trawl.hf.quantizer import TrawlConfig, TrawlQuantizer, register
from trawl.hf.replacement import install

__all__ = [
    "FactorStack",
    "FactoredLinear",
    "TrawlConfig",
    "TrawlQuantizer",
    "check_folder",
    "install",
    "load",
    "register",
]

register()
