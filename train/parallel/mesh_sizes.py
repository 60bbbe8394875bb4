"""Read `--mesh`: how many ranks lie along each axis. Standard library only."""

import math

from train.runs.errors import TrainError

MESH_AXES = ("replicate", "shard")
MESH_LATER = ("tensor", "pipeline")  # names reserved for their usual meaning


def mesh_sizes(text: str, world: int) -> dict[str, int]:
    """The size of each axis of `--mesh`; one axis may lack its number, which is then world / the product of the others.

    Errors (TrainError): an unknown axis, two axes without a number, sizes whose product is not `world`.

    >>> mesh_sizes("shard", 8), mesh_sizes("replicate=2,shard", 8)
    ({'replicate': 1, 'shard': 8}, {'replicate': 2, 'shard': 4})
    """
    sizes, free = dict.fromkeys(MESH_AXES, 1), None
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name in MESH_LATER:
            raise TrainError(f"--mesh {text}: the axis {name!r} is not built yet; those that are: {', '.join(MESH_AXES)}")
        if name not in MESH_AXES or (number and not (number.isdecimal() and int(number))):
            raise TrainError(f"--mesh {text}: {part!r} is not AXIS or AXIS=SIZE; the axes are {', '.join(MESH_AXES)}")
        if number:
            sizes[name] = int(number)
        elif free is not None:
            raise TrainError(f"--mesh {text}: {free} and {name} both lack a size; one may")
        else:
            free = name
    rest, left = divmod(world, math.prod(sizes.values()))
    if free is not None and not left:
        sizes[free] = rest
    if math.prod(sizes.values()) != world:
        ranks = f"{world} rank" + "s" * (world > 1)
        raise TrainError(f"--mesh {text} does not fit {ranks}; how many there are, torchrun --nproc-per-node says")
    return sizes
