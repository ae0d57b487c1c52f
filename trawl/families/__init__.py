"""Model families: which stored tensors hold which roles, from YAML files, with an inferred fallback."""

from trawl.families.description import ATTENTION, FC, OUTSIDE, ROLES, Family, Role, load_family, packaged_families
from trawl.families.matching import FamilyMatch, Placement, describe_matrices, match_family

__all__ = [
    "ATTENTION",
    "FC",
    "OUTSIDE",
    "ROLES",
    "Family",
    "FamilyMatch",
    "Placement",
    "Role",
    "describe_matrices",
    "load_family",
    "match_family",
    "packaged_families",
]
