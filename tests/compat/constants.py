"""Sizes and arguments that these tests share."""

INPUT_SIZE, HIDDEN_DIMS, OUTPUT_SIZE = 5, 10, 2  # of the two-layer net in nnsight's walkthrough
TOKENS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}  # arguments of `generate` for three tokens
