"""Which tokens of one prompt correspond to which tokens of another.

    mapping = map_tokens([1, 5, 7, 2], [1, 5, 9, 8, 2])     # 7 became 9 8
    mapping.matrix                                          # (source tokens, target tokens): 9 and 8 get half of 7 each
    mapping.is_mapped                                       # (target tokens,): False for tokens that are new

Equal tokens correspond to each other. Replaced tokens are shared among the tokens that replace them. Prompt-to-Prompt
needs this mapping to replace and add words (Hertz et al. 2022, section 4).
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import torch


class TokenMapping(NamedTuple):
    """How tokens of one prompt are mapped to those of another."""

    matrix: torch.Tensor
    is_mapped: torch.Tensor


def map_tokens(source: Sequence[int], target: Sequence[int]) -> TokenMapping:
    """Return how the tokens of two prompts are mapped, by their ids."""
    matrix = torch.zeros(len(source), len(target))
    for kind, i, j, k, m in SequenceMatcher(None, list(source), list(target), autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and j - i == m - k):
            matrix[range(i, j), range(k, m)] = 1
        elif kind == "replace":
            matrix[i:j, k:m] = 1 / (m - k)
    return TokenMapping(matrix, matrix.sum(0) > 0)
