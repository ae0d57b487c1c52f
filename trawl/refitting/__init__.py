"""Refitting a narrowed FC: what writes the units that stay takes over what was left out, in closed form."""

from trawl.refitting.running import seal_refitted

__all__ = ["seal_refitted"]
