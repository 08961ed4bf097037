"""Files of an embedding cache: a set's embeddings in parts, each followed by its checksum.

00000003.npy   float32 [items of the part, D], then the SHA-256 of these bytes, which NumPy
               ignores when it reads the file
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import InputError
from data_prep.storage.atomic import write_atomically
from pretrain.distributed.collectives import rank, world_size

logger = logging.getLogger(__name__)

CHECKSUM_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Parts:
    """Files of a set's embeddings, and the partition of its items."""

    folder: Path
    num_items: int
    part_size: int
    embed_dim: int

    def __len__(self) -> int:
        return math.ceil(self.num_items / self.part_size)

    def path(self, part: int) -> Path:
        return self.folder / f"{part:08d}.npy"

    def items(self, part: int) -> range:
        return range(part * self.part_size, min((part + 1) * self.part_size, self.num_items))

    def is_finished(self, part: int) -> bool:
        """Returns whether a part is complete and undamaged."""
        try:
            self.read_part(part)
        except FileNotFoundError:
            return False
        except (ValueError, OSError) as error:
            logger.warning("%s: damaged (%s); encoding it again", self.path(part), error)
            return False
        return True

    def own_missing(self) -> list[int]:
        """Lists the missing parts assigned to this process."""
        own = range(rank(), len(self), world_size())
        return [part for part in own if not self.is_finished(part)]

    def write(self, part: int, embeddings: Tensor) -> None:
        """Writes a part atomically."""
        content = io.BytesIO()
        np.save(content, embeddings.numpy())
        checksum = hashlib.sha256(content.getvalue()).digest()
        write_atomically(self.path(part), content.getvalue() + checksum)

    def read_part(self, part: int) -> np.ndarray:
        """Reads a part: float32 [items of the part, D].

        Raises:
            ValueError: if it is damaged.
            OSError: if it is missing or cannot be read.
        """
        content = self.path(part).read_bytes()
        content, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
        if hashlib.sha256(content).digest() != checksum:
            raise ValueError("its checksum does not match")
        embeddings = np.load(io.BytesIO(content), allow_pickle=False)
        expected = (len(self.items(part)), self.embed_dim)
        if embeddings.shape != expected or embeddings.dtype != np.float32:
            raise ValueError(
                f"expected float32 {list(expected)}, found {embeddings.dtype} "
                f"{list(embeddings.shape)}"
            )
        if not np.isfinite(embeddings).all():
            raise ValueError("not all numbers are finite")
        return embeddings

    def read(self) -> Tensor:
        """Reads and concatenates all parts: [items, D].

        Raises:
            InputError: if a part is missing or damaged.
        """
        try:
            parts = [self.read_part(part) for part in range(len(self))]
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.folder}: a part was damaged or deleted after it had been checked: "
                f"{error}; run the command again, which encodes it again"
            ) from None
        return torch.from_numpy(np.concatenate(parts))
