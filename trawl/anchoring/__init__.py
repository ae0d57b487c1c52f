"""Anchored runs: block by block, targets from the original model, inputs from the compressed one."""

from trawl.anchoring.running import seal_anchored

__all__ = ["seal_anchored"]
