"""Several processes train one network, on torch's own engines: DDP and FSDP2.

ranks        the processes of a run, and the values that they exchange
mesh_sizes   reads --mesh; mesh: ranks along its axes
parallelize  wraps an objective in DistributedDataParallel or fully_shard
shard        this rank's shard of a tensor, and the full tensor
"""
