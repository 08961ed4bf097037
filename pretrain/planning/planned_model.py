"""The model of a config without weights: its tensors are fakes with a shape, type and device.

It is built on the meta device, as `build_model` builds it, and then converted to the fake tensors
of torch's FakeTensorMode. Operators on fakes choose the kernels of the CPU but compute nothing.
Neither weights nor datasets nor tokenizers are read. The exception is a text tower whose vocabulary
is that of its tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.checkpoint import build_model_of
from pretrain.config import PretrainConfig
from pretrain.data.batch import StreamLayout, ViewLayout
from pretrain.data.transforms import build_transforms
from pretrain.data.view_formats import build_formats
from pretrain.fakes.fake_tensors import become_fake, fake_mode
from pretrain.model.activation_checkpointing import checkpoint_blocks
from pretrain.model.contrastive_model import ContrastiveModel, EncoderInputs, StreamInputs
from pretrain.model.open_clip_backbone import FROM_SCRATCH_TEXT
from pretrain.model.sample_dropout import DropKeys
from pretrain.model.tokenizer import Tokenizer, build_tokenizer
from pretrain.optimization.parameter_traits import set_traits
from pretrain.settings.data import StreamName
from pretrain.settings.model import Model, TextTower, TowerSection, VectorTower

CLIP_VOCAB_SIZE = 49408  # tokens of CLIP's byte-pair encoding


Layouts = dict[StreamName, StreamLayout]


@dataclass(frozen=True)
class PlannedModel:
    """A model of fake tensors and the layouts of its inputs.

    Attributes:
        model: model in training mode.
        layouts: number of steps done -> layout of the rows of each stream from then on.
        fakes: mode in which operators on its tensors run.
    """

    model: ContrastiveModel
    layouts: dict[int, Layouts]
    fakes: FakeTensorMode

    def inputs(self, layouts: Layouts, stream: StreamName, *, num_rows: int) -> EncoderInputs:
        """Returns fake samples of one stream, with captions of full length."""
        with self.fakes:
            views = {
                view: _empty_inputs(layout, num_rows)
                for view, layout in layouts[stream].views.items()
            }
            slots = torch.zeros(num_rows, dtype=torch.int64)
            keys = DropKeys(torch.zeros((), dtype=torch.int64), slots)
        return {stream: StreamInputs(views, keys)}


def _empty_inputs(layout: ViewLayout, num_rows: int) -> tuple[Tensor, ...]:
    """Tensors of a view, in the order of `ViewBatch.inputs`."""
    tensors = layout.tensors(num_rows)
    names = [name for name in ("values", "masks", "num_rows") if name in tensors]
    found = [torch.empty(tensors[name][0], dtype=tensors[name][1]) for name in names]
    if found[0].ndim == 4:
        found[0] = found[0].movedim(-1, 1)  # [B, H, Wd, 3] -> [B, 3, H, Wd]
    return tuple(found)


def plan_model(config: PretrainConfig) -> PlannedModel:
    """Builds the model of a config from fake tensors.

    Raises:
        InputError: if a tower cannot be built without files that are not on this machine.
        ConfigError: if a pattern of parameters matches none.
    """
    without_weights = config.model_copy(update={"model": without_weights_of(config.model)})
    tokenizer = _stand_in_tokenizer(config.model)
    with torch.device("meta"):
        model = build_model_of(without_weights, tokenizer)
    set_traits(model, config.optimizer, sections=config.model)  # freezes parameters by pattern
    if config.engine.activation_checkpointing:
        checkpoint_blocks(model)
    fakes = fake_mode()
    become_fake(model.train(), fakes)
    return PlannedModel(model, _layouts(config, tokenizer), fakes)


def without_weights_of(config: Model) -> Model:
    """Returns the section `model` with towers of the same sizes that begin from scratch."""
    plain = {
        name: _from_scratch(tower)
        for name in ("image", "audio", "text")
        if (tower := getattr(config, name)) is not None
    }
    modalities = {
        name: section
        if isinstance(section.tower, str | VectorTower)
        else section.model_copy(update={"tower": _from_scratch(section.tower)})
        for name, section in config.modalities.items()
    }
    return config.model_copy(update=plain | {"modalities": modalities})


def _from_scratch(tower: TowerSection) -> TowerSection:
    if tower.library == "torch":  # the file of its vectors determines its size
        return tower
    update = {"pretrained": False, "start": None}
    if tower.library == "transformers" and isinstance(tower.pretrained, str):
        update["name"] = tower.pretrained
    return tower.model_copy(update=update)


class _StandInTokenizer(Tokenizer):
    """A tokenizer that encodes every caption as the same tokens; the backend may be missing."""

    @property
    def largest_id(self) -> int:
        """Always 0, because the plan does not compare vocabularies."""
        return 0

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return torch.ones(len(captions), self.context_length, dtype=torch.int64)


def _stand_in_tokenizer(config: Model) -> Tokenizer | None:
    text = config.text
    if text is None:
        return None
    has_own = text.library == "open_clip" and text.tokenizer is None
    if not has_own and any(_takes_vocabulary(tower) for tower in config.towers.values()):
        known = build_tokenizer(text)
        return _StandInTokenizer(
            known.backend,
            context_length=text.context_length,
            pad_id=known.pad_id,
            vocab_size=known.vocab_size,
        )
    return _StandInTokenizer(
        None, context_length=text.context_length, pad_id=0, vocab_size=CLIP_VOCAB_SIZE
    )


def _takes_vocabulary(tower: TowerSection) -> bool:
    """Whether the tokenizer determines the size of a text tower."""
    if not isinstance(tower, TextTower):
        return False
    is_sized_by_options = "vocab_size" in tower.options
    return tower.library == "torch" or (
        tower.library == "open_clip" and tower.name == FROM_SCRATCH_TEXT and not is_sized_by_options
    )


def _layouts(config: PretrainConfig, tokenizer: Tokenizer | None) -> dict[int, Layouts]:
    """The layouts of every segment of images."""
    found = {}
    for step in sorted({0, *config.image.sizes, *config.image.patch_dropouts}):
        image = config.image.at_step(step)
        transforms = build_transforms(config.model, image=image, audio=config.audio)
        options = {"transforms": transforms, "tokenizer": tokenizer}
        found[step] = {
            name: StreamLayout(
                {
                    view: each.layout
                    for view, each in build_formats(stream.views, config.model, **options).items()
                }
            )
            for name, stream in config.streams.items()
        }
    return found
