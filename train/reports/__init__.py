"""What a person sees of a run, and where time and memory go.

log            the bar, lines, metrics.jsonl
curves         curves.png and its diagnosis
summary        the text before the first step and after the last
phases rate    seconds by phase; the machine's own rate beside the step's
profiler       a trace of a few steps
view           the parts of a run that its reports read
step_profiler  one step observed: --profile, --memory-report
memory         predicted and measured memory of a step
"""
