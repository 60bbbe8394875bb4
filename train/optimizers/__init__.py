"""Optimizers, each beside its reference implementation, and the parts around an update.

adamw adamw8bit muon sgd   AdamW, also with moments of 8 bits, Muon and SGD; each says by its `OPTIMIZER` that it is one
named_optimizer   their base class: one step for plain, sharded and bfloat16 weights, and state with names
registry build groups   the names that `--optimizer` takes; the optimizers of a run; parameter groups by role and rate
rounding     stochastic rounding to bfloat16
schedule     the learning rate as a function of the step
clip         clipping by the global gradient norm
precision    the number formats of a step
scaler       loss scaling for float16
ema          an exponential moving average of the weights
"""
