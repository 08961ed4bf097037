"""The contrastive model: towers of modalities, one joint space, temperatures by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_prep.errors import InputError
from pretrain.captioning.sample_outputs import outputs_of_samples
from pretrain.captioning.tower_tokens import ViewTokens, give_tokens, pooled, token_width
from pretrain.model.caption_trimming import accept_trimmed_captions, takes_trimmed_captions
from pretrain.model.drop_layers import replace_drop_layers
from pretrain.model.log_mel import LogMelSpectrogram
from pretrain.model.named_modules import NamedParameters, NamedTowers
from pretrain.model.sample_dropout import DropKeys, TowerDropKeys, pair_keys
from pretrain.model.tokenizer import Tokenizer
from pretrain.model.towers import (
    TowerConfig,
    build_media_backbone,
    build_text_backbone,
    ends_in_joint_space,
    probe_backbone,
    save_tower_config,
)
from pretrain.model.vector_inputs import StandardizedVectors, build_backbone_of_vectors
from pretrain.settings.data import StreamName
from pretrain.settings.model import (
    MediaKind,
    MediaTower,
    Model,
    TextTower,
    VectorTower,
    tower_key,
)
from pretrain.settings.objectives import ModuleUse
from pretrain.settings.transforms import AudioTransform, ImageTransform
from pretrain.settings.views import View, own_outputs, view_of_features
from pretrain.towers.blocks import Layers, layers_of
from pretrain.towers.projection import build_projection


class StepFeatures(NamedTuple):
    """Inputs of the objectives of a step."""

    # [B, D] of each view of a stream, L2-normalised; zero where a sample lacks the modality. Also
    # [B, K] of each module of an objective (see `own_outputs`)
    views: dict[StreamName, dict[str, Tensor]]
    scales: dict[str, Tensor]  # [1], inverse temperatures by name
    biases: dict[str, Tensor]  # [1], of the temperatures of sigmoid losses


class PresentRows(NamedTuple):
    """Which of B samples have a modality: P of them."""

    rows: Tensor  # int64 [P]
    mask: Tensor  # bool [B], on the CPU


class StreamInputs(NamedTuple):
    """Inputs of the towers for the samples of one stream; B may be 0."""

    views: Mapping[str, tuple[Tensor, ...]]  # tensors [B, ...] of each view, for `Tower.forward`
    drop_keys: DropKeys | None = None  # in training: identity of the samples, for dropout
    present: Mapping[str, PresentRows] = {}  # of views with tensors [P, ...] of some samples alone


EncoderInputs = Mapping[StreamName, StreamInputs]
OnView = Callable[[StreamName, str, Tensor], None]
# stream -> (name of the features, name of the head, name of its tower)
Heads = Mapping[StreamName, Sequence[tuple[str, str, str]]]
ModuleUses = Mapping[StreamName, Sequence[ModuleUse]]
TOKENS = "@tokens"  # name of a tower's tokens among its outputs


class EncodedView(NamedTuple):
    """Outputs of a tower for P samples of a view; one row if P is 0."""

    features: dict[str, Tensor]  # [P, D] or, in `EncodedView.of_rows`, [B, D], by name
    tokens: Tensor | None  # [max(1, P), L, W], if the tower gives tokens
    inputs: tuple[Tensor, ...]  # inputs of the tower, as many rows as tokens


class NormalizedPixels(nn.Module):
    """Normalises pixels, uint8 [B, 3, H, Wd] -> float32, with the configured mean and std."""

    def __init__(self, config: ImageTransform) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std


class Tower(nn.Module):
    """Input stage, backbone and projection into the joint space: [B, ...] -> [B, D].

    Args:
        input_stage: module that maps the tensors of a batch to the backbone's input.
        backbone: backbone from pretrain.model.towers.
        projection: module that maps [B, W] to [B, D].
        width: W; None if no objective has a projection of its own.
        token_width: width of the tokens of a backbone that gives tokens; None if it does not.
        drop_keys: keys shared by the backbone's dropout layers.
        layers: layers of the backbone; None if no setting needs them.

    Attributes:
        is_frozen: whether no parameter of the backbone is ever trained.
        held: backbone or blocks of it that stay in evaluation mode, because they are not trained
            now.
    """

    def __init__(
        self,
        input_stage: nn.Module,
        backbone: nn.Module,
        projection: nn.Module,
        *,
        width: int | None = None,
        token_width: int | None = None,
        drop_keys: TowerDropKeys,
        layers: Layers | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.token_width = token_width
        self.drop_keys = drop_keys
        self.layers = layers
        self.held: list[nn.Module] = []
        self.input_stage = input_stage
        self.backbone = backbone
        self.projection = projection
        self.is_frozen = not any(p.requires_grad for p in backbone.parameters())

    def forward(
        self,
        *inputs: Tensor,
        keys: Tensor | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        with_tokens: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Encodes [B, ...] -> [B, D].

        Args:
            inputs: tensors for the input stage.
            keys: int64 [B] from `pair_keys`; required in training if the backbone has dropout.
            heads: further modules that map [B, W] to [B, D], by name.
            with_tokens: whether to return tokens, too.

        Returns:
            [B, D]; with heads or tokens, {name: [B, D]}, where "" is the name of the projection,
            and {TOKENS: [B, L, W]}.
        """
        with self.drop_keys.set_pairs(keys):
            output = self.backbone(self.input_stage(*inputs))
            features = pooled(self.backbone, output)  # [B, W]
            projected = self.projection(features)
            if not heads and not with_tokens:
                return projected
            tokens = {TOKENS: output[1]} if with_tokens else {}
            of_heads = {name: head(features) for name, head in (heads or {}).items()}
            return {"": projected} | of_heads | tokens

    def train(self, mode: bool = True) -> Tower:
        """Sets the mode; parts that are not trained stay in evaluation mode.

        They keep their statistics and drop nothing.
        """
        super().train(mode)
        for part in (self.backbone,) if self.is_frozen else self.held:
            part.eval()
        return self


class ContrastiveModel(nn.Module):
    """Encodes samples of several modalities into a joint space.

    Use `encode`, `encode_image`, `encode_audio` and `encode_text`, except in training, which uses
    `forward`.

    Attributes:
        kinds: kind of each modality.
        tower_names: name of each modality's tower; modalities may share one.
        seed: seed of dropout in training.
        takes_trimmed_captions: whether tokens of the tower `text` can be cut to the longest caption
            of a batch without changing any embedding.
    """

    def __init__(
        self,
        towers: Mapping[str, Tower],
        *,
        temperatures: Sequence[str],
        initial_scale: float,
        seed: int,
        kinds: Mapping[str, str] | None = None,
        tower_names: Mapping[str, str] | None = None,
        heads: Heads | None = None,
        modules: Mapping[str, nn.Module] | None = None,
        module_uses: ModuleUses | None = None,
        embed_dim: int = 0,
        initial_biases: Mapping[str, float] | None = None,
        takes_trimmed_captions: bool = False,
    ) -> None:
        super().__init__()
        self.kinds = dict(kinds or {name: name for name in towers})
        self.tower_names = dict(tower_names or {name: name for name in towers})
        self.seed = seed
        self.takes_trimmed_captions = takes_trimmed_captions
        self.towers = NamedTowers(towers)
        self._heads_of = heads or {}
        named = {name: tower for each in self._heads_of.values() for _, name, tower in each}
        self.heads = NamedTowers(
            {
                name: build_projection("mlp", width=towers[tower].width, embed_dim=embed_dim)
                for name, tower in named.items()
            }
        )
        self._module_uses = module_uses or {}
        self.objective_modules = NamedTowers(modules or {})
        # Shape (1,), because engines that flatten parameters do not support scalars.
        initial = torch.full((1,), math.log(initial_scale))
        self.log_logit_scale = NamedParameters(
            {name: nn.Parameter(initial.clone()) for name in temperatures}
        )
        self.logit_bias = NamedParameters(
            {
                name: nn.Parameter(torch.full((1,), bias))
                for name, bias in (initial_biases or {}).items()
            }
        )

    def forward(
        self, micro_batches: Sequence[EncoderInputs], *, on_view: OnView | None = None
    ) -> StepFeatures:
        """Computes the features of every view of every stream; B may differ between streams.

        Args:
            micro_batches: inputs, encoded one after the other; their features are concatenated.
            on_view: called with (stream, name, features [B, D]) as soon as they are encoded.
        """
        return StepFeatures(
            {name: self._encode_stream(name, micro_batches, on_view) for name in micro_batches[0]},
            {name: log_scale.exp() for name, log_scale in self.log_logit_scale.items()},
            {name: bias.clone() for name, bias in self.logit_bias.items()},
        )

    def _encode_stream(
        self, name: StreamName, micro_batches: Sequence[EncoderInputs], on_view: OnView | None
    ) -> dict[str, Tensor]:
        inputs = [micro_batch[name] for micro_batch in micro_batches]
        parts: dict[str, list[Tensor]] = {}
        features = {}
        for part in self._encode_parts(name, inputs):
            for feature, values in part.items():
                parts.setdefault(feature, []).append(values)
                if len(parts[feature]) == len(inputs):
                    features[feature] = torch.cat(parts.pop(feature))
                    if on_view is not None:
                        on_view(name, feature, features[feature])
        return features

    def _encode_parts(
        self, name: StreamName, inputs: Sequence[StreamInputs]
    ) -> Iterator[dict[str, Tensor]]:
        """Yields the features of a view of a micro-batch, and outputs of modules, by name.

        Without modules, a view is complete as early as possible. Modules need all views of a
        micro-batch, whose tokens are then freed.
        """
        # Held-out samples may lack a view altogether.
        shown = inputs[0].views.keys()
        uses = [use for use in self._module_uses.get(name, ()) if shown >= set(use.views)]
        if not uses:
            yield from (
                self.encode_view(name, view, each) for view in inputs[0].views for each in inputs
            )
            return
        for each in inputs:
            encoded = {}
            for view in each.views:
                encoded[view] = self._encode_view(name, view, each)
                yield encoded[view].features
            yield {own_outputs(use.objective): self._run_module(use, encoded, each) for use in uses}

    def _run_module(
        self, use: ModuleUse, encoded: Mapping[str, EncodedView], inputs: StreamInputs
    ) -> Tensor:
        """[B, K] of an objective's module; zero for samples that lack one of its views."""
        views = [
            ViewTokens(encoded[v].tokens, encoded[v].inputs[0] if self._is_text(v) else None)
            for v in use.views
        ]
        masks = [inputs.present[v].mask if v in inputs.present else None for v in use.views]
        return outputs_of_samples(
            self.objective_modules[use.module],
            views,
            masks,
            num_samples=len(encoded[use.views[0]].features[use.views[0]]),
        )

    def _is_text(self, view: str) -> bool:
        return self.kinds[View.parse(view).modality] == "text"

    def encode_view(self, stream: StreamName, view: str, inputs: StreamInputs) -> dict[str, Tensor]:
        """Encodes a view of a stream's samples, once for all objectives that read it.

        Returns:
            {name of the features: [B, D], L2-normalised, zero where a sample lacks the modality}.
            The names are that of the view, and those of `own_features` for objectives with a
            projection of their own.
        """
        return self._encode_view(stream, view, inputs).features

    def _encode_view(self, stream: StreamName, view: str, inputs: StreamInputs) -> EncodedView:
        present, keys = inputs.present.get(view), None
        if inputs.drop_keys is not None:
            keys = pair_keys(inputs.drop_keys, seed=self.seed, stream=stream, view=view)
            keys = keys if present is None else keys[present.rows]
        heads = {
            feature: self.heads[name]
            for feature, name, _ in self._heads_of.get(stream, ())
            if view_of_features(feature) == view
        }
        tower = self.towers[self._tower_name(view)]
        reads_tokens = any(view in use.views for use in self._module_uses.get(stream, ()))
        encoded = _encode(
            tower, *inputs.views[view], keys=keys, heads=heads, with_tokens=reads_tokens
        )
        found = encoded.features
        found[view] = found.pop("")
        if present is not None:
            for feature, values in found.items():
                zeros = values.new_zeros(len(present.mask), values.shape[1])
                found[feature] = zeros.index_copy(0, present.rows, values)
        return encoded

    def _tower_name(self, view: str) -> str:
        return self.tower_names[View.parse(view).modality]

    def encode(self, view: str, *inputs: Tensor, keys: Tensor | None = None) -> Tensor:
        """Encodes a view to L2-normalised embeddings [B, D].

        Args:
            view: a modality, such as "image", or a view of it (see pretrain.settings.views).
            inputs: tensors of its kind. Images: uint8 [B, 3, H, Wd]. Clips: float32 [B, samples],
                and in training SpecAugment's masks, int32 [B, masks, 2]. Tokens: int64 [B, L].
                Vectors: float32 [B, width], or [B, time, width] and their lengths, int64 [B].
            keys: int64 [B] from `pair_keys`; required in training if the backbone has dropout.
        """
        tower = self.towers[self._tower_name(view)]
        return _encode(tower, *inputs, keys=keys, heads={}).features[""]

    def encode_tokens(self, modality: str, *inputs: Tensor) -> Tensor:
        """Returns the tokens [B, P, W] of a tower that gives tokens; inputs as in `encode`."""
        tower = self.towers[self._tower_name(modality)]
        return tower(*inputs, with_tokens=True)[TOKENS]

    @property
    def module_uses(self) -> list[ModuleUse]:
        """Uses of modules of objectives, of all streams."""
        return [use for uses in self._module_uses.values() for use in uses]

    def encode_media(self, modality: str, media: Tensor) -> Tensor:
        """Encodes images or clips, as `encode_image` and `encode_audio`, to [B, D]."""
        return self.encode(modality, media)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encodes images, uint8 [B, 3, H, Wd], to L2-normalised embeddings [B, D]."""
        return self.encode("image", pixels)

    def encode_audio(self, waveforms: Tensor) -> Tensor:
        """Encodes waveforms, float32 [B, samples], to L2-normalised embeddings [B, D]."""
        return self.encode("audio", waveforms)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encodes captions, int64 [B, L], to L2-normalised embeddings [B, D]."""
        return self.encode("text", tokens)

    def save_assets(self, folder: Path) -> None:
        """Writes the files that rebuild the towers, in addition to config and weights."""
        for name, tower in self.towers.items():
            save_tower_config(tower.backbone, folder, name=name)


def _encode(
    tower: Tower,
    *inputs: Tensor,
    keys: Tensor | None,
    heads: Mapping[str, nn.Module],
    with_tokens: bool = False,
) -> EncodedView:
    """{name: [B, D], L2-normalised}, as `Tower.forward` names them, and tokens; B may be 0.

    Many backbones cannot encode an empty batch, so one row is encoded and then removed from the
    output. All parameters still receive a gradient, of zero.
    """
    num_rows = len(inputs[0])
    if num_rows == 0:
        inputs = tuple(each.new_ones(1, *each.shape[1:]) for each in inputs)
        keys = None if keys is None else keys.new_ones(1)
    found = tower(*inputs, keys=keys, heads=heads, with_tokens=with_tokens)
    found = found if isinstance(found, dict) else {"": found}
    tokens = found.pop(TOKENS, None)
    normalised = {
        name: functional.normalize(features.float(), dim=-1)[:num_rows]
        for name, features in found.items()
    }
    return EncodedView(normalised, tokens, inputs)


def build_model(
    config: Model,
    *,
    image: ImageTransform,
    audio: AudioTransform,
    temperatures: Mapping[str, bool],
    heads: Heads | None = None,
    module_uses: ModuleUses | None = None,
    seed: int,
    tokenizer: Tokenizer | None,
    assets: Path | None = None,
) -> ContrastiveModel:
    """Builds a model whose weights are initialised from a seed or from pretrained towers.

    Args:
        config: config section `model`.
        image: config section `image`, with the size and normalisation of images.
        audio: config section `audio`, with the length and spectrogram of clips.
        temperatures: name of each temperature -> whether it has a bias.
        heads: projections of objectives, see `PretrainConfig.heads`.
        module_uses: modules of objectives, see `PretrainConfig.modules`.
        seed: seed of the weights and of dropout in training.
        tokenizer: tokenizer of the text towers; None without one.
        assets: folder of a checkpoint's assets; pretrained weights are then not loaded.

    Raises:
        InputError: if a tower cannot be built, or has a layer that pretrain.model.towers rejects.
    """
    torch.manual_seed(seed)
    kinds = config.kinds
    uses = [use for of_stream in (module_uses or {}).values() for use in of_stream]
    with_tokens = {tower for use in uses for tower in use.towers}
    builders = {
        "image": partial(_build_image_tower, transform=image, assets=assets),
        "audio": partial(_build_audio_tower, transform=audio, assets=assets),
        "text": partial(_build_text_tower, tokenizer=tokenizer, assets=assets),
        "vector": partial(_build_vector_tower, modalities=config.modalities),
    }
    towers = {
        name: builders[kinds[name]](
            section, name, embed_dim=config.embed_dim, with_tokens=name in with_tokens
        )
        for name, section in config.towers.items()
    }
    takes_trimmed = "text" in towers and takes_trimmed_captions(towers["text"].backbone, tokenizer)
    if takes_trimmed:
        accept_trimmed_captions(towers["text"].backbone)
    return ContrastiveModel(
        towers,
        temperatures=list(temperatures),
        kinds=kinds,
        tower_names={modality: config.tower_of(modality) for modality in kinds},
        heads=heads,
        modules=_build_modules(uses, towers, tokenizer),
        module_uses=module_uses,
        embed_dim=config.embed_dim,
        initial_scale=config.logit_scale.initial,
        seed=seed,
        initial_biases={
            name: config.initial_logit_bias for name, has_bias in temperatures.items() if has_bias
        },
        takes_trimmed_captions=takes_trimmed,
    )


def _build_modules(
    uses: Sequence[ModuleUse], towers: Mapping[str, Tower], tokenizer: Tokenizer | None
) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for use in uses:
        if use.module not in modules:
            of_views = [towers[name] for name in use.towers]
            modules[use.module] = use.section.build_module(
                of_views, tokenizer=tokenizer, where=use.where
            )
    return modules


def _build_image_tower(
    config: MediaTower, name: str, *, transform: ImageTransform, **options: Any
) -> Tower:
    pixels = _two_examples(3, transform.size, transform.size).to(torch.uint8)
    stage = NormalizedPixels(transform)
    tower = _build_media_tower(config, name, "image", stage, pixels, **options)
    sizes = set(transform.sizes.values()) - {transform.size}
    if sizes:
        from pretrain.towers.image_sizes import refuse_other_sizes, resample_positions

        resample_positions(tower.backbone)
        others = (_two_examples(3, size, size).to(torch.uint8) for size in sorted(sizes))
        refuse_other_sizes(tower.backbone, map(stage, others), where=tower_key(name))
    return tower


def _build_audio_tower(
    config: MediaTower, name: str, *, transform: AudioTransform, **options: Any
) -> Tower:
    waveforms = _two_examples(round(transform.clip_seconds * transform.sample_rate_hz)) / 256
    stage = LogMelSpectrogram(transform)
    return _build_media_tower(config, name, "audio", stage, waveforms, **options)


def _build_media_tower(
    config: MediaTower,
    name: str,
    kind: MediaKind,
    stage: nn.Module,
    media: Tensor,
    *,
    assets: Path | None,
    **options: Any,
) -> Tower:
    examples = stage(media)
    backbone = build_media_backbone(
        config, kind=kind, name=name, assets=assets, input_shape=examples.shape[2:]
    )
    return _build_tower(config, name, stage, backbone, examples, **options)


def _build_text_tower(
    config: TextTower, name: str, *, tokenizer: Tokenizer, assets: Path | None, **options: Any
) -> Tower:
    backbone = build_text_backbone(config, name=name, tokenizer=tokenizer, assets=assets)
    tokens = tokenizer(["a caption", "one more"])
    return _build_tower(config, name, nn.Identity(), backbone, tokens, **options)


def _build_vector_tower(
    config: VectorTower, name: str, *, modalities: Mapping[str, Any], **options: Any
) -> Tower:
    sizes = {"width": modalities[name].width, "max_rows": modalities[name].max_rows}
    stage = StandardizedVectors(**sizes)
    num_rows = () if sizes["max_rows"] is None else (torch.tensor([1, sizes["max_rows"]]),)
    examples = stage(_two_examples(*stage.shape).float(), *num_rows)
    backbone = build_backbone_of_vectors(config, **sizes)
    return _build_tower(config, name, stage, backbone, examples, **options)


def _build_tower(
    config: TowerConfig,
    name: str,
    input_stage: nn.Module,
    backbone: nn.Module,
    examples: Tensor,
    *,
    embed_dim: int,
    with_tokens: bool,
) -> Tower:
    """Builds a tower around a backbone, whose output width is determined with two examples."""
    where = tower_key(name)
    if with_tokens:
        give_tokens(backbone, where=where)
    drop_keys = TowerDropKeys() if config.frozen else replace_drop_layers(backbone, kind=name)
    width = probe_backbone(
        backbone, examples, where=where, drop_keys=None if config.frozen else drop_keys
    )
    tokens = token_width(backbone, examples[:1], where=where) if with_tokens else None
    projection = _projection(config, name, width, embed_dim)
    layers = None
    if config.layer_decay is not None or config.frozen_blocks is not None:
        was_training = backbone.training
        layers = layers_of(backbone.eval(), lambda: backbone(examples[:1]))
        backbone.train(was_training)
    return Tower(
        input_stage,
        backbone,
        projection,
        width=width,
        token_width=tokens,
        drop_keys=drop_keys,
        layers=layers,
    )


def _two_examples(*shape: int) -> Tensor:
    """int64 [2, *shape], two different examples of numbers from 0 to 255."""
    numbers = torch.arange(math.prod(shape))
    return torch.stack([numbers * 7 % 251, numbers * 11 % 256]).view(2, *shape)


def _projection(config: TowerConfig, kind: str, width: int, embed_dim: int) -> nn.Module:
    """The projection from W to D; an identity for backbones that include one."""
    if ends_in_joint_space(config):
        if width != embed_dim:
            raise InputError(
                f"model.embed_dim={embed_dim}: {config.library}'s {config.name} "
                f"({tower_key(kind)}) ends in a joint space of {width}; set embed_dim to {width}"
            )
        return nn.Identity()
    return build_projection(config.projection, width=width, embed_dim=embed_dim)
