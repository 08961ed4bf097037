"""In-memory files for libsndfile."""

from __future__ import annotations

import io


class SoundBytes(io.BytesIO):
    """In-memory file that clamps seeks before the start to position 0.

    libsndfile seeks before the start of damaged files, and prints the error instead of raising it.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a position, or to the start if it is negative."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.getbuffer().nbytes}
        return super().seek(max(0, start[whence] + offset))
