"""Optimizers, each beside its plain twin, and what stands around an update.

adamw adamw8bit muon sgd   AdamW, also with moments of 8 bits, Muon and SGD
named_optimizer   the base class: one step for plain, sharded and bfloat16 weights, and state with names
rounding     stochastic rounding to bfloat16
schedule     the learning rate as a function of the step
clip         the global gradient norm
precision    the number formats of a step, and the scaling of the loss in float16
ema          averaged weights beside the raw ones
"""
