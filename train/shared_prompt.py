"""Read a prompt once: several replies stand behind it in one row, and do not see each other.

    three rows   prompt a               one row    prompt a b c
                 prompt b               document   shared 0…0 1…1 2…2
                 prompt c               position   0…p-1  p…  p…  p…

Keys of document SHARED (`model.mask`) are seen by every document of their row; U counts the positions of a joint row.
The hidden states are those of separate rows, but for rounding. G replies of n tokens take p + G n positions in place of
G (p + n), in a row that is longer: attention costs more. `choose_joint_rows` weighs the two.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.packing.collate import PAD_MULTIPLE, PADDING_DOCUMENT
from data.transforms.causal import IGNORE
from model.config import ModelConfig
from model.mask import SHARED

WORTH = 0.9  # of the cost of separate rows; above, they are read as they are

Read = Callable[[nn.Module, Mapping[str, Tensor], Tensor], Tensor]  # (network, inputs, labels B T) -> hidden B T D


class JointRows(NamedTuple):
    """Places of B rows in joint rows. start_B: the position of a row's first token behind the prompt."""

    row_B: list[int]
    start_B: list[int]
    document_B: list[int]
    count: int  # of joint rows
    width: int  # positions of the longest


def join_rows(lengths_B: Sequence[int], prompts_B: Sequence[int], groups_B: Sequence[int], most: int) -> JointRows:
    """Place up to `most` rows of a group behind one prompt, in their order.

    >>> join_rows([5, 4, 6], [3, 3, 3], [0, 0, 0], most=2)
    JointRows(row_B=[0, 0, 1], start_B=[3, 5, 3], document_B=[0, 1, 0], count=2, width=6)
    """
    row_B, start_B, document_B = [], [], []
    open_row: dict[int, int] = {}  # of each group
    ends, members = [], []  # of each joint row
    for length, prompt, group in zip(lengths_B, prompts_B, groups_B, strict=True):
        row = open_row.get(group)
        if row is None or members[row] == most:
            row = open_row[group] = len(ends)
            ends.append(prompt)
            members.append(0)
        row_B.append(row)
        start_B.append(ends[row])
        document_B.append(members[row])
        ends[row] += length - prompt
        members[row] += 1
    return JointRows(row_B, start_B, document_B, len(ends), max(ends))


def choose_joint_rows(
    config: ModelConfig, width: int, space: int, lengths_B: list[int], prompts_B: list[int], groups_B: list[int]
) -> JointRows | None:
    """Return the joint rows that cost least, of 2, 4, 8 … replies each or of all; None where separate rows do, or nearly.

    A position costs about 24 D² + 4 U D operations a block: the matrix products, and attention over a row of U positions.
    space: positions that a row may have.
    """

    def cost(rows: int, positions: int) -> int:
        return rows * positions * (6 * config.width + positions)

    best, least = None, WORTH * cost(len(lengths_B), width)
    largest, most = max(Counter(groups_B).values()), 1
    while most < largest:
        most = min(2 * most, largest)
        joint = join_rows(lengths_B, prompts_B, groups_B, most)
        positions = padded(joint.width)
        if positions <= space and cost(joint.count, positions) <= least:
            best, least = joint, cost(joint.count, positions)
    return best


def padded(width: int) -> int:
    return -(-width // PAD_MULTIPLE) * PAD_MULTIPLE


def read_rows(network: nn.Module, inputs: Mapping[str, Tensor], labels_BT: Tensor | None = None) -> Tensor:
    """Return the last hidden states of the rows as they are, B T D."""
    return network.body(**inputs).hidden


def read_groups(network: nn.Module, inputs: Mapping[str, Tensor], group_B: Tensor, prompt_B: Tensor) -> Tensor:
    """Return the last hidden states of rows, B T D, of which those of one group begin with the same prompt.

        inputs     input_ids and attention_mask B T, padded on the right
        group_B    the number of each row's group
        prompt_B   tokens of each row that are equal in its whole group
    """
    ids_BT, length_B = inputs["input_ids"], inputs["attention_mask"].sum(-1)
    if len(ids_BT) < 2:
        return read_rows(network, inputs)
    lengths_B, prompts_B, groups_B = torch.stack((length_B, prompt_B, group_B)).tolist()  # waits for a GPU, once a batch
    space = network.config.context - network.body.num_virtual_tokens if network.config.position == "learned" else 1 << 62
    joint = choose_joint_rows(network.config, ids_BT.size(1), space, lengths_B, prompts_B, groups_B)
    if joint is None:
        return read_rows(network, inputs)
    room, device = padded(joint.width), ids_BT.device
    row_B1, start_B1, document_B1 = torch.tensor([joint.row_B, joint.start_B, joint.document_B], device=device)[..., None]
    place_1T = torch.arange(ids_BT.size(1), device=device)[None, :]
    is_prompt_BT, is_real_BT = place_1T < prompt_B[:, None], place_1T < length_B[:, None]
    # The position of each token in the joint row. Padding goes to one more place at the end, which is cut off.
    place_BT = place_1T.where(is_prompt_BT, place_1T + (start_B1 - prompt_B[:, None])).where(is_real_BT, room)
    index_N = (row_B1 * (room + 1) + place_BT).flatten()

    def join(values_BT: Tensor, filler: int) -> Tensor:
        row_PU = values_BT.new_full((joint.count, room + 1), filler)
        row_PU.view(-1).scatter_(0, index_N, values_BT.flatten())  # equal values where rows share a place
        return row_PU[:, :room]

    shared = {
        "input_ids": join(ids_BT, 0),
        "document_ids": join(document_B1.masked_fill(is_prompt_BT, SHARED), PADDING_DOCUMENT),
        "position_ids": join(place_1T.expand_as(ids_BT), 0),
    }
    hidden_PUD = network.body(**shared).hidden
    return hidden_PUD[row_B1, place_BT.clamp(max=room - 1)]


def read_pairs(network: nn.Module, inputs: Mapping[str, Tensor], labels_BT: Tensor) -> Tensor:
    """Return the last hidden states of rows that alternate, chosen and rejected reply of one prompt, B T D.

    The prompt ends at a row's first label. Rows of a pair must have one prompt.
    """
    scored_BT, length_B = labels_BT != IGNORE, inputs["attention_mask"].sum(-1)
    prompt_B = torch.where(scored_BT.any(-1), scored_BT.int().argmax(-1) + 1, length_B)
    prompt_B = prompt_B.view(-1, 2).amin(-1).repeat_interleave(2)
    return read_groups(network, inputs, torch.arange(len(prompt_B), device=prompt_B.device) // 2, prompt_B)


def can_share(config: ModelConfig) -> bool:
    """True where a position's hidden state depends on tokens and position ids alone: windows and relative positions count
    places in the row."""
    counts_places = config.position not in ("rope", "learned") or any(window is not None for window in config.windows)
    return not (counts_places or config.bidirectional_prompt or config.architecture != "decoder")


def choose_read(config: ModelConfig) -> Read:
    """Return `read_pairs` where rows can share a prompt, else `read_rows`."""
    return read_pairs if can_share(config) else read_rows
