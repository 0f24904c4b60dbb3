"""The attention patching lens of nnterp: let a prompt attend to the last token of another prompt.

    probabilities = patch_object_attn_lens(model, "the capital of Japan", "The capital of x is", position=4)
    probabilities[0, 12]            # with layers 12 to 16 patched, (vocabulary,)

For each layer i, the inputs of the attentions of layers i to i + num_patches - 1 at one position of the target are
replaced with those at the last token of the source (Dumas et al., "Separating Tongue from Thought", 2025).
"""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.tokens.batches import as_prompts, open_batches
from diffsight.lenses.tokens.choosing import check_count, check_language_model
from diffsight.pipelines.language.model import LanguageModel


def patch_object_attn_lens(
    model: LanguageModel,
    source_prompts: str | Sequence[str],
    target_prompts: str | Sequence[str],
    position: int,
    num_patches: int = 5,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> torch.Tensor:
    """Return the probabilities of the next token of each target for each first patched layer.

    Args:
        model: The model.
        source_prompts: Prompts whose last tokens are attended to: one for each target, or one for all.
        target_prompts: The prompts that are continued.
        position: The position in each target whose attention inputs are replaced; -1 is the last token.
        num_patches: The number of layers in a row that are patched.
        batch_size: The number of prompts in a pass.
        progress: Whether to show a progress bar.

    Returns:
        Probabilities on the CPU, (targets, layers, vocabulary).

    Raises:
        InputError: The numbers of prompts differ, or a position does not exist.
    """
    check_language_model("patch_object_attn_lens", model)
    sources, targets = as_prompts(source_prompts), as_prompts(target_prompts)
    if len(sources) not in (1, len(targets)):
        raise InputError(f"there are {len(sources)} sources for {len(targets)} targets: pass one, or one for each")
    num_patches = check_count("num_patches", num_patches)
    count = len(model.layers_output)
    batches = open_batches(model, sources, -1, batch_size)
    open_batches(model, targets, position, batch_size)  # checks the positions
    found: list[list[torch.Tensor]] = [[] for _ in range(count)]
    for batch in batches:
        with torch.no_grad(), batch.run as run:
            for layer in range(count):
                found[layer].append(batch.pick(run.attentions_input[layer]))
            run.stop()
    states = [torch.cat(parts).expand(len(targets), -1) for parts in found]
    rows = []
    for first in tqdm(range(count), desc="layers", disable=not progress):
        parts = []
        for batch in open_batches(model, targets, position, batch_size):
            with torch.no_grad(), batch.run as run:
                for layer in range(first, min(first + num_patches, count)):
                    hidden = run.attentions_input[layer].clone()
                    hidden[batch.indices] = states[layer][batch.start : batch.start + len(hidden)].to(hidden)
                    run.attentions_input[layer] = hidden
                parts.append(run.next_token_probs.cpu())
        rows.append(torch.cat(parts))
    return torch.stack(rows, 1)
