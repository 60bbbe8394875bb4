"""Reports on a run: progress, curves, time and memory.

log            the bar, lines, metrics.jsonl
tensorboard    the same numbers for TensorBoard
curves         curves.png and its diagnosis
rollouts       rollouts.png: the curves of reinforcement
compare        several runs: a table of what differs, one picture
comparability  whether the losses of runs may be compared
drawing        an example: its tokens over their labels
summary        the text before the first step and after the last
phases rate    seconds by phase; speed, and model FLOPs utilization
profiler       a trace of a few steps, and their operators
failures       messages about a run that cannot go on
view           the parts of a run that its reports read
step_profiler  one step observed: --profile, --memory-report
memory         predicted and measured memory of a step
"""
