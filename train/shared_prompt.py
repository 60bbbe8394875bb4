"""Read the prompt of a pair once: both replies stand behind it in one row, and do not see each other.

    two rows    prompt chosen           one row    prompt chosen rejected
                prompt rejected         document   shared 0…0    1…1
                                        position   0…p-1  p…     p…

Keys of document SHARED (`model.mask`) are seen by every document of their row; U counts the positions of the joint row.
The hidden states are those of two rows, but for rounding. A forward reads p + n_c + n_r tokens in place of 2 p + n_c + n_r.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from data.packing.collate import PAD_MULTIPLE, PADDING_DOCUMENT
from data.transforms.causal import IGNORE
from model.config import ModelConfig
from model.mask import SHARED

WORTH = 0.9  # of the positions of two rows; above, longer rows cost more in attention than the prompt saves

Read = Callable[[nn.Module, Mapping[str, Tensor], Tensor], Tensor]  # (network, inputs, labels B T) -> hidden B T D


def read_rows(network: nn.Module, inputs: Mapping[str, Tensor], labels_BT: Tensor) -> Tensor:
    """Return the last hidden states of the rows as they are, B T D."""
    return network.body(**inputs).hidden


def read_pairs(network: nn.Module, inputs: Mapping[str, Tensor], labels_BT: Tensor) -> Tensor:
    """Return the last hidden states of rows that alternate, chosen and rejected reply of one prompt, B T D.

    inputs: input_ids and attention_mask B T, padded on the right. The prompt ends at a row's first label. Rows of a pair must
    have one prompt.
    """
    ids_BT, length_B = inputs["input_ids"], inputs["attention_mask"].sum(-1)
    if not len(ids_BT):
        return read_rows(network, inputs, labels_BT)
    scored_BT = labels_BT != IGNORE
    prompt_B = torch.where(scored_BT.any(-1), scored_BT.int().argmax(-1) + 1, length_B)
    prompt_P, chosen_P, rejected_P = torch.minimum(prompt_B[::2], prompt_B[1::2]), length_B[::2], length_B[1::2]
    longest = int((chosen_P + rejected_P - prompt_P).max())  # waits for a GPU, once a batch
    room = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    space = network.config.context - network.body.num_virtual_tokens
    if room > WORTH * ids_BT.size(1) * 2 or (network.config.position == "learned" and room > space):
        return read_rows(network, inputs, labels_BT)
    place_PT = torch.arange(ids_BT.size(1), device=ids_BT.device)[None, :].expand(len(prompt_P), -1)
    # Where each position of a row stands in the shared one; a pad at its end, which nothing reads.
    other_PT = torch.where(place_PT < prompt_P[:, None], place_PT, place_PT + (chosen_P - prompt_P)[:, None])
    is_own_PT = (place_PT >= prompt_P[:, None]) & (place_PT < rejected_P[:, None])
    is_chosen_PT = place_PT < chosen_P[:, None]

    def join(chosen_PT: Tensor, rejected_PT: Tensor, filler: int) -> Tensor:
        row_PU = chosen_PT.new_full((len(prompt_P), room + 1), filler)  # one place more for what is left out
        row_PU.scatter_(1, place_PT.where(is_chosen_PT, room), chosen_PT)
        row_PU.scatter_(1, other_PT.where(is_own_PT, room), rejected_PT)
        return row_PU[:, :room]

    document_PT = torch.where(place_PT < prompt_P[:, None], SHARED, 0)
    shared = {
        "input_ids": join(ids_BT[::2], ids_BT[1::2], 0),
        "document_ids": join(document_PT, torch.ones_like(place_PT), PADDING_DOCUMENT),
        "position_ids": join(place_PT, place_PT, 0),
    }
    hidden_PUD = network.body(**shared).hidden
    place_BT = torch.stack((place_PT, other_PT), dim=1).flatten(0, 1).clamp(max=room - 1)
    pair_B1 = torch.arange(len(prompt_P), device=ids_BT.device).repeat_interleave(2)[:, None]
    return hidden_PUD[pair_B1, place_BT]


def choose_read(config: ModelConfig) -> Read:
    """Return `read_pairs` where a position's hidden state depends on tokens and position ids alone, else `read_rows`: windows
    and relative positions count places in the row."""
    counts_places = config.position not in ("rope", "learned") or any(window is not None for window in config.windows)
    return read_rows if counts_places or config.bidirectional_prompt or config.architecture != "decoder" else read_pairs
