"""A gated recurrent network over sequences of different lengths; padding has no effect.

Results are those of packed sequences. Packing itself would copy the lengths to the CPU, for which
a step would wait.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaskedGru(nn.Module):
    """Layers of GRUs (Cho et al. 2014) over the first positions of each row.

    Args:
        input_width: numbers at each position.
        width: numbers of a state W; half of them for each direction if bidirectional.
        num_layers: number of layers.
        is_bidirectional: whether a second network reads each row from its end.
    """

    def __init__(
        self, input_width: int, width: int, *, num_layers: int = 1, is_bidirectional: bool = False
    ) -> None:
        super().__init__()
        state = width // 2 if is_bidirectional else width
        widths = [input_width] + [width] * (num_layers - 1)
        self.forwards = nn.ModuleList(nn.GRU(each, state, batch_first=True) for each in widths)
        self.backwards = nn.ModuleList(
            nn.GRU(each, state, batch_first=True) for each in widths if is_bidirectional
        )

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes sequences, in float32 also under autocast.

        Args:
            inputs: [B, L, input_width].
            lengths: int64 [B] from 0 to L, on any device; positions from there on are padding.

        Returns:
            (states [B, L, W], last states [B, W]). States are zero at padding. A last state is that
            of the last position, followed by the first position's in the other direction.
        """
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        mask = (positions < lengths[:, None])[..., None]  # [B, L, 1]
        back = (lengths[:, None] - 1 - positions).clamp(min=0)[..., None]  # position to read then
        states = inputs.masked_fill(~mask, 0.0)
        with torch.autocast(inputs.device.type, enabled=False):
            dtype = next(self.parameters()).dtype
            states = states.to(dtype)
            for layer, ahead in enumerate(self.forwards):
                found = [ahead(states)[0]]
                if len(self.backwards):
                    turned = states.gather(1, back.expand_as(states))
                    seen = self.backwards[layer](turned)[0]
                    found.append(seen.gather(1, back.expand_as(seen)))
                states = torch.cat(found, dim=2).masked_fill(~mask, 0.0)
        last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, found[0].shape[2])
        ends = [states[..., : found[0].shape[2]].gather(1, last)[:, 0]]  # [B, L, W] -> [B, W]
        if len(self.backwards):
            ends.append(states[:, 0, found[0].shape[2] :])
        return states, torch.cat(ends, dim=1)
