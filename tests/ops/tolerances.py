"""The one table of the ops' tolerances, each with its reason."""

import torch

from dpkernels.backends.bounds import gamma

# One table: how far above the truth a norm may be, as (‖G‖ + tolerance·S)² with S = Σ_t‖x_t‖‖g_t‖.
# 16-bit inputs become float32 without loss, so what they are off by is what float32 is.
NORM_ABOVE = {
    # the norm's own error and its bound, the sum's bound, and c·g: 4γ of one accumulation, and some
    torch.float32: 4.5 * gamma(128, torch.float32),
    torch.bfloat16: 4.5 * gamma(128, torch.float32),
    torch.float16: 4.5 * gamma(128, torch.float32),
    torch.float64: 1e-12,  # sums of up to 10³ products in float64
}
# A float32 Gram may use this much of the square before direct takes over (csrc/cpu/linear.cpp).
GRAM_SHARE = 1e-2
# Added on top, relative: the final rounding to float32.
FLOAT32_ROUNDING = 2.0**-23
# How far above on average for benign inputs of a few hundred frames: a bound that is loose everywhere costs
# accuracy of training, since every clipped gradient shrinks with it. 4γ_128·√T at T = 300.
MEAN_EXCESS = 1e-3
# The float64 truth's own rounding, relative to S²: a result is never further below than that.
TRUTH_ROUNDING = 1e-13
# How far a weighted sum may be from the truth, relative to Σ_i c_i S_i, with a float64 out.
SUM_OFF = {
    torch.float32: gamma(128, torch.float32),
    torch.bfloat16: gamma(128, torch.float32),
    torch.float16: gamma(128, torch.float32),
    torch.float64: 1e-13,
}
# c·‖what was added‖ may exceed C by the float64 rounding of the test's own norm.
CLIP_ROUNDING = 1.0 + 1e-13
# Three steps of an optimizer in float32 beside float64 ones: a few roundings of the parameter and of its update, which
# where m and v nearly vanish is a quotient of small numbers (lr = 0.1, weights up to 4).
FUSED_OFF = {"rtol": 1e-6, "atol": 1e-6}
# Share of the entries whose noised gradient may differ in its last float32 bit: normals that differ in the last place
# of a float64 fall on two sides of the grid's or of float32's middle with a probability of 2⁻²⁸ or so.
FUSED_GRADIENT = 1e-4

DTYPES = tuple(NORM_ABOVE)
