"""The post-training quantizers: every module here is one, and gives it as ``QUANTIZER``.

The preset takes names, settings and their descriptions from ``QUANTIZERS``, so a new method is a new module here and no
other change.
"""

from importlib import import_module
from pkgutil import iter_modules

from kdctl.quant.quantizer import Quantizer

QUANTIZERS: dict[str, Quantizer] = {
    found.name: import_module(f"{__name__}.{found.name}").QUANTIZER for found in iter_modules(__path__)
}
