"""Token embeddings by factors: rows of a matrix that is never formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trawl.hf.linear import FactoredLinear, Part


def embeds(module: nn.Module) -> bool:
    """Whether a module looks up rows of its weight and does nothing else but scale them, as Gemma's does."""
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale"))


class FactoredEmbedding(FactoredLinear):
    """Stands in for nn.Embedding: a token's row of the left factor, times the core and the right factor.

    Attributes:
        num_embeddings: size of the vocabulary.
        embedding_dim: size of the output's last axis.
        scale: what outputs are multiplied by; None for 1.
        kind: the class that it stands in for.
        padding_idx: as that class has it.
    """

    def __init__(self, part: Part, module: nn.Embedding) -> None:
        super().__init__([part], 1, None)
        self.num_embeddings, self.embedding_dim = self.in_features, self.out_features
        self.scale: float | None = getattr(module, "scalar_embed_scale", None)
        self.kind, self.padding_idx = type(module), module.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings of tokens, (..., embedding_dim)."""
        (part,) = self.parts
        rows = functional.embedding(ids, part.stack.left) * part.stack.middle(part.index)
        found = part.stack.times_transposed("right", rows)
        return found if self.scale is None else found * found.new_tensor(self.scale)

    def dense(self) -> nn.Embedding:
        """Return a module of the kind that it stands in for, its weight to be filled."""
        options: dict[str, Any] = {} if self.scale is None else {"embed_scale": self.scale}
        made = self.kind(self.num_embeddings, self.embedding_dim, self.padding_idx, **options)
        if self.scale is not None:
            scale = torch.tensor(self.scale, device=self.parts[0].stack.left.device)
            made.register_buffer("embed_scale", scale, persistent=False)
        return made
