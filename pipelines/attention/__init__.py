"""Attention modules and their products of queries, keys and values.

attention_values           the values of a module: `attn.attention_probs`, `attn.products[1].q`
attention_modules          which modules are attention modules
attention_mode             the function mode that watches their computations
product_dispatch           which functions make products, and how their calls are handled
product_count              how many products a module makes in a call
watched_modules            the modules that are watched, and the products of a call
sdpa_attention             products in a fused kernel
eager_attention            products and softmax written out
matrix_factors             the two factors of a product of matrices
heads_layout               where the heads are in a tensor
passing_values             reading and changing a value as it passes a tap
attention_probabilities    one product: queries, keys, values and probabilities, whole or in blocks
"""
