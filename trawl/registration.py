"""Registration with transformers, at no cost to those who never load a model.

``import trawl`` is to make ``AutoModel….from_pretrained`` know factored folders, but importing transformers' model code
takes seconds that ``trawl plan`` should not pay. So the plug-in is imported when transformers' own loading code is:
at once if it is there already, otherwise right after it has been imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

LOADING_CODE = "transformers.modeling_utils"
PLUG_IN = "trawl.hf"


def register_when_needed() -> None:
    """Import the plug-in now or right after transformers' loading code; repeating it changes nothing."""
    if LOADING_CODE in sys.modules:
        importlib.import_module(PLUG_IN)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the loading code once, by the other finders, and takes itself off."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 (the interface has it)
        target: ModuleType | None = None,  # noqa: ARG002 (likewise)
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != LOADING_CODE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs a module as its own loader does, then imports the plug-in."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(PLUG_IN)
