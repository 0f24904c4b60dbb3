"""Attention modules and the products that they make.

attention_values           what is asked of a module: `attn.attention_probs`, `attn.products[1].q`
attention_modules          which modules are attention modules
attention_mode             the function mode that sees what they compute
product_dispatch           which functions make products, and what becomes of their calls
product_count              how many products a module makes in a call
watched_modules            which of them are watched, and the products of a call
sdpa_attention             products in a fused kernel
eager_attention            products and softmax written out
matrix_factors             the two factors of a product of matrices
heads_layout               where the heads are in a tensor
passing_values             reading and changing a value while it passes
attention_probabilities    one product: queries, keys, values, probabilities, in whole or in blocks
"""
