"""Run folders on disk, below every command line: nothing here imports another part of train.

checkpoint   a run's state on disk: complete or absent, never half
sharded      the tensors of a checkpoint that several ranks wrote, readable on any number of ranks
export       a checkpoint, sharded or not, as one model folder
lock         one live run a folder
open         the checkpoint or model folder that a command is given, and its network
errors       what a user can put right, and a checkpoint that is damaged
"""
