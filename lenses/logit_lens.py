"""The logit lens: what a language model would say if it stopped at each of its layers.

    result = logit_lens(model, "The Eiffel Tower is in the city of", tokens=" Paris")
    result.words[0][28]                         # [..., " Paris"]: layer 28, position by position
    result.plot()

The hidden state of a layer goes straight into the final norm and the head (nostalgebraist, "interpreting GPT: the logit
lens", 2020), with the scales and caps that the model has there: the last layer's predictions are the model's own.
"""

from typing import Any

import torch
from tqdm.auto import tqdm

from diffsight.lenses.tokens.batches import Layers, Positions, Tokens, choose, open_batches
from diffsight.lenses.tokens.predictions import LensPredictions
from diffsight.lenses.tokens.reader import Reader, Sources, joined, predictions
from diffsight.pipelines.language.model import LanguageModel


def logit_lens(
    model: LanguageModel,
    prompts: Any,
    *,
    layers: Layers = None,
    positions: Positions = None,
    top_k: int = 5,
    tokens: Tokens = None,
    keep_logits: bool = False,
    batch_size: int = 32,
    progress: bool = True,
    **inputs: Any,
) -> LensPredictions:
    """Reads what each of `layers` gives at `positions` as predictions of the next token.

        logit_lens(model, prompts, layers=range(0, 30, 5), positions=-1, tokens=[" Paris", " London"])

    `prompts` are a text, several, or token ids; positions count the tokens of each prompt, -1 is its last. Kept are
    the `top_k` likeliest tokens, and the probabilities of `tokens` (ids, or texts of one token) where they are given;
    with `keep_logits` the logits over the whole vocabulary, (prompts, layers, positions, vocabulary). None stands for
    all layers and all positions. `inputs` go to the model along with the prompts.

    Of a model with an encoder and a decoder (T5, BART) it reads the decoder's layers, at the tokens that the decoder is
    given: `decoder_input_ids=`, a row a prompt or one for all, else the one that it starts with.

    Raises InputError, before anything runs, for a layer, position or token that is not there, an empty or too long
    prompt, and a model that is no language model with a head."""
    chosen, ids = choose("logit_lens", model, layers, tokens, top_k)
    batches = open_batches(model, prompts, positions, batch_size, **inputs)
    reader, read = Reader(model, top_k, ids, keep_logits), []
    for batch in tqdm(batches, desc="logit lens", disable=not progress or len(batches) == 1):
        with torch.no_grad(), batch.run as run:
            for layer in chosen:
                reader.add(batch.pick(run.layers_output[layer]))
            run.stop()
            read.append({name: batch.spread(values) for name, values in reader.take(len(chosen)).items()})
    whole = {name: joined([part[name] for part in read], 2) for name in read[0]}
    return predictions("logit_lens", model, chosen, ids, Sources.of(model, batches), whole)
