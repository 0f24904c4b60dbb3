"""nnterp's side of `language.py`, for an environment with nnterp. Each task is a line of JSON in and a line out.

{"task": "collect", "result": "a.safetensors"}  ->  {"wall": 1.3, "cpu": 1.3, "peak": 310.0}
"""

import json
import os
import sys
from collections.abc import Callable

import torch
from measuring import measured
from nnterp import StandardizedTransformer
from nnterp.interventions import TargetPrompt, logit_lens, patchscope_lens
from nnterp.nnsight_utils import collect_token_activations_batched
from safetensors.torch import save_file


def tasks(model: StandardizedTransformer, given: dict) -> dict[str, Callable[[], torch.Tensor]]:
    target = TargetPrompt(given["target"], -1)
    return {
        "all logits": lambda: logit_lens(model, given["few"]),  # it always returns the whole vocabulary
        "collect": lambda: collect_token_activations_batched(model, given["many"], given["batch"]),
        "patchscope": lambda: patchscope_lens(model, given["sources"], target),
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    torch.set_num_threads(1)
    folder, given = sys.argv[1], json.loads(sys.stdin.readline())
    known = tasks(StandardizedTransformer(folder, check_attn_probs_with_trace=False), given)
    for line in sys.stdin:
        asked = json.loads(line)
        result, figures = measured(known[asked["task"]])
        if asked["result"]:
            save_file({"result": result.contiguous()}, asked["result"])
        del result
        print(json.dumps(figures), file=answers, flush=True)


if __name__ == "__main__":
    main()
