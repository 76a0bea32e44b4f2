"""The losses: tensors in, a loss per token and metrics out.

With `l` the log-probability of a token under the policy in training, `b` under the policy that decoded it, `A` the
advantage (times the shaper's inclusion weight), `rho = exp(l - b)`, and `sg` stopping the gradient:

    kind           per token                                             sum divided by
    dapo           -min(t A, clip(t, 1 - eps_low, 1 + eps_high) A)       tokens of the step
    grpo           the same, eps_low = eps_high                          length of each sample, then samples
    dr_grpo        the same, advantages without deviation                samples times the longest possible response
    gspo           the same with the geometric mean of rho over a sample as in grpo
    cispo          -sg(min(rho, 1 + eps_high)) A l                       as in dapo
    decoupled_ppo  -sg(w) min(u A, clip(u) A), u = rho / w               as in dapo
    reinforce      -sg(w) A l                                            as in dr_grpo

`b` is what the generator reported for that token under the version it had then. It is never recomputed: a ratio between
two forward passes of the learner is 1 by construction, and clipping it would do nothing about stale samples.
`importance` bounds rho or w, per token or per sequence.

Every loss is a sum over tokens with a share per token, and the step divides once by its denominator (`aggregation`). So
a gradient does not depend on the split of the step into groups and micro-batches.
"""
