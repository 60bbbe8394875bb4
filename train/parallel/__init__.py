"""Several processes train one network, on torch's own engines: DDP and FSDP2.

ranks   the processes of a run, and what they exchange
shard   the part of a tensor that this rank holds, and the full tensor
"""
