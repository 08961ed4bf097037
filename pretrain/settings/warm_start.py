"""Config section `start` of a tower: weights that a new run begins with."""

from __future__ import annotations

from typing import Literal

from pydantic import create_model

from data_prep.config_file import Location, Section, free

# A field cannot be declared as `from`, which is a keyword of Python.
_From = create_model(
    "_From",
    __base__=Section,
    # A file; a folder of open_clip, Hugging Face or timm; a run folder or checkpoint (path or URL);
    # a model of a hub, such as openai/clip-vit-base-patch32@<revision>; open_clip:<model>/<tag>; or
    # timm:<model>.<tag>. The fingerprint of the weights is part of the identity
    **{"from": (Location, free())},
)


class Start(_From):
    """Weights of a tower at step 0, from another model or run."""

    # tower of the source to take: image, audio, text, or a name of a run's modalities; null: the
    # one of the same name or kind
    tower: str | None = None
    # of a run: plain, or ema: the averages that a run with optimizer.ema keeps
    weights: Literal["plain", "ema"] = "plain"
    # interpolate positions and patches of another size; cut or extend positions of captions
    resample: bool = True
    # Patterns (* is anything) of tensors of the tower that the source need not have: they keep
    # their random values
    expect_missing: list[str] = []
    ignore: list[str] = []  # patterns of tensors of the source that are left out

    @property
    def location(self) -> str:
        """Path, URL or name of the source."""
        return getattr(self, "from")

    @property
    def source(self) -> str:
        """Location and, unless they are plain, the kind of weights: what is read of the source."""
        return self.location if self.weights == "plain" else f"{self.location} ({self.weights})"
