"""Model families: which stored tensors hold which roles, from YAML files, with an inferred fallback."""

from trawl.families.description import (
    ATTENTION,
    EXPERTS,
    FC,
    KIND_OF,
    KINDS,
    OUTSIDE,
    ROLES,
    Family,
    Role,
    load_family,
    packaged_families,
)
from trawl.families.inference import match_family
from trawl.families.matching import FamilyMatch, Placement, describe_matrices

__all__ = [
    "ATTENTION",
    "EXPERTS",
    "FC",
    "KINDS",
    "KIND_OF",
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
