"""The logit lens: what a language model would predict if it stopped at each of its layers.

    result = logit_lens(model, "The Eiffel Tower is in the city of", tokens=" Paris")
    result.words[0][28]                         # [..., " Paris"]: layer 28, position by position
    result.plot()

The hidden state of a layer goes straight into the final norm and the head (nostalgebraist, "interpreting GPT: the logit
lens", 2020), including the scales and caps that the model has there. So the last layer's predictions are the model's
own.
"""

from typing import Any

import torch
from tqdm.auto import tqdm

from diffsight.lenses.layers import Layers
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.tokens.batches import Positions, join, open_batches
from diffsight.lenses.tokens.choosing import Tokens, hidden_states, layers_and_tokens
from diffsight.lenses.tokens.prediction_reader import PredictionReader
from diffsight.lenses.tokens.predictions import LensPredictions
from diffsight.lenses.tokens.sources import Sources
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.language.model import LanguageModel


@repeatable
@where_the_model_is
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
    """Read the hidden states of each of `layers` at `positions` as predictions of the next token.

        logit_lens(model, prompts, layers=range(0, 30, 5), positions=-1, tokens=[" Paris", " London"])

    In a model with an encoder and a decoder (T5, BART) the lens reads the decoder's layers, at the decoder's tokens.
    Pass these as `decoder_input_ids=`, one row for each prompt or one for all. Default: the decoder's start token.

    Args:
        model: The model.
        prompts: A string, several strings, or token ids.
        layers: Layer i is the output of `layers[i]`, -1 the last, and "embedding" the input of the first: an integer, a
            slice, or a list of them. Default: all layers, without the embedding.
        positions: Positions in each prompt: 0 is its first token, -1 its last; "image" are the tokens of images.
            Default: all.
        top_k: The number of most likely tokens to keep.
        tokens: Tokens whose probabilities to keep: ids, or strings that are one token each.
        keep_logits: Whether to keep all logits, (prompts, layers, positions, vocabulary).
        batch_size: The number of prompts in a batch.
        progress: Whether to show a progress bar.
        inputs: Further inputs of the model.

    Returns:
        The predictions by prompt, layer and position.

    Raises:
        InputError: Before anything runs, if a layer, position or token does not exist, a prompt is empty or too long,
            or the model is not a language model with a head.
    """
    chosen, ids, top_k = layers_and_tokens("logit_lens", model, layers, tokens, top_k)
    check_options(logit_lens, model, inputs)
    batches = open_batches(model, prompts, positions, batch_size, **inputs)
    reader, read = PredictionReader(model, top_k, ids, keep_logits), []
    for batch in tqdm(batches, desc="logit lens", disable=not progress or len(batches) == 1):
        with torch.no_grad(), batch.run as run:
            for layer in chosen:
                reader.add(batch.pick(hidden_states(run, layer)))
            run.stop()
            read.append({name: batch.spread(values) for name, values in reader.take(len(chosen)).items()})
    whole = {name: join([part[name] for part in read], 2) for name in read[0]}
    return Sources.of(model, batches).predictions("logit_lens", model, chosen, ids, whole)
