"""Backbones from timm, open_clip and transformers.

A backbone takes the input of a tower (pixels, log-mel spectrogram or tokens) and returns [B, W].
Layers that would make a result depend on the number of processes or on the rest of the batch are
rejected (see docs/reproducibility.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_prep.errors import InputError
from pretrain.captioning.tower_tokens import pooled
from pretrain.fakes.fake_tensors import run_on_fakes
from pretrain.model.drop_layers import check_rows_of_samples, refuse_other_randomness
from pretrain.model.library_errors import describe_library_error
from pretrain.model.open_clip_backbone import (
    FROM_SCRATCH_TEXT,
    build_open_clip_media,
    build_open_clip_text,
)
from pretrain.model.sample_dropout import TowerDropKeys
from pretrain.model.tokenizer import Tokenizer
from pretrain.model.transformers_backbone import (
    TransformersMedia,
    TransformersText,
    build_transformers_media,
    build_transformers_text,
)
from pretrain.settings.model import MediaKind, MediaTower, TextTower, TowerSection, tower_key
from pretrain.towers.attention_dropout import zero_attention_dropout
from pretrain.towers.frozen_statistics import freeze_batch_norms, has_frozen_statistics
from pretrain.towers.model_inputs import timm_size_options
from pretrain.towers.small_text import build_small_text, save_sizes

logger = logging.getLogger(__name__)

TowerConfig = TowerSection

# Options of the libraries that the run's config decides -> what to use instead.
REFUSED_OPTIONS = {
    name: advice
    for names, advice in [
        (
            ("cast_dtype", "dtype", "param_dtype", "precision", "torch_dtype"),
            "weights are always float32; engine.precision sets the precision of the computation",
        ),
        (("device", "device_map"), "engine.device sets the device"),
        (
            ("load_in_4bit", "load_in_8bit", "quantization_config"),
            "weights are always float32; load weights that are not quantized",
        ),
    ]
    for name in names
}


# The size of the input is the usual reason why a backbone cannot encode it.
_SIZE_ADVICE = {
    "model.image": "; if the size is the reason, set image.size to one that the model takes",
    "model.audio": "; if the size is the reason, set audio.log_mel.num_frames and num_mel_bins to "
    "those that the model takes",
}


# ------------------------------------------------------------------------------------ building


def _build_timm(
    config: MediaTower,
    kind: MediaKind,
    saved: Path | None,
    input_shape: tuple[int, int] | None = None,
) -> nn.Module:
    import timm

    weights: dict[str, Any] = {"pretrained": config.pretrained is True and saved is None}
    if isinstance(config.pretrained, str) and saved is None:
        weights["checkpoint_path"] = config.pretrained
    channels = 3 if kind == "image" else 1
    build = partial(timm.create_model, config.name, num_classes=0, in_chans=channels)
    sizes = timm_size_options(config.name, config.options, input_shape)
    if sizes:
        try:
            return build(**weights, **sizes, **config.options)
        except TypeError as error:  # a model without this argument
            if "img_size" not in str(error):
                raise
    return build(**weights, **config.options)


_MEDIA_BUILDERS = {
    "timm": _build_timm,
    "open_clip": build_open_clip_media,
    "transformers": build_transformers_media,
}
_TEXT_BUILDERS = {
    "open_clip": build_open_clip_text,
    "transformers": build_transformers_text,
    "torch": build_small_text,
}


def build_media_backbone(
    config: MediaTower,
    *,
    kind: MediaKind,
    name: str | None = None,
    assets: Path | None = None,
    input_shape: tuple[int, int] | None = None,
) -> nn.Module:
    """Builds the encoder of one kind of media, without projection.

    Args:
        config: config section of the tower.
        kind: "image" (input [B, 3, H, Wd]) or "audio" (input [B, 1, F, S]).
        name: name of the tower; None: its kind.
        assets: folder of a checkpoint's assets; pretrained weights are then not loaded.
        input_shape: (H, Wd) or (F, S), for models built for one size; None leaves the model's own.

    Raises:
        InputError: if the library cannot build the encoder, or a trained encoder has batch norm.
    """
    name = name or kind
    if assets is None:
        _refuse_options(config.options, tower_key(name))
    saved = None if assets is None else tower_folder(assets, name)
    return _build_backbone(
        lambda: _MEDIA_BUILDERS[config.library](config, kind, saved, input_shape),
        tower_key(name),
        config,
    )


def build_text_backbone(
    config: TextTower, *, tokenizer: Tokenizer, name: str = "text", assets: Path | None = None
) -> nn.Module:
    """Builds the encoder of captions: int64 [B, L] -> [B, W], without projection.

    Args:
        config: config section of the tower.
        tokenizer: tokenizer of the captions.
        name: name of the tower.
        assets: folder of a checkpoint's assets; pretrained weights are then not loaded.

    Raises:
        InputError: if the library cannot build the encoder, a trained encoder has batch norm, or
            its vocabulary is smaller than the tokenizer's.
    """
    if assets is None:
        _refuse_options(config.options, tower_key(name))
    saved = None if assets is None else tower_folder(assets, name)
    backbone = _build_backbone(
        lambda: _TEXT_BUILDERS[config.library](config, tokenizer, saved), tower_key(name), config
    )
    if assets is None:
        _refuse_small_vocabulary(backbone, tokenizer, config)
    return backbone


def _build_backbone(build: Callable[[], nn.Module], where: str, config: TowerConfig) -> nn.Module:
    try:
        backbone = build()
    except InputError:
        raise
    except Exception as error:  # libraries raise errors of any type
        weights, advice = "", ""
        if config.pretrained:
            weights = f" and pretrained: {config.pretrained!r}"
            advice = "; `start` (docs/warm-starts.md) takes weights of other sizes and with a head"
        raise InputError(
            f"{where}: {config.library} cannot build {config.name!r} with options "
            f"{config.options}{weights}: {describe_library_error(error)}{advice}"
        ) from error
    refuse_quantized_weights(backbone, where)
    backbone.float()  # weights may be saved in half precision
    _turn_off_caches(backbone)
    if not config.attention_dropout:
        zero_attention_dropout(backbone)
        logger.info("%s: dropout of attention weights is off (attention_dropout: off)", where)
    if getattr(config, "batch_norm", None) == "frozen":
        freeze_batch_norms(backbone)
    if config.frozen:
        backbone.requires_grad_(False)
    else:
        _refuse_batch_norm(backbone, where)
    return backbone


def _refuse_options(options: dict[str, Any], where: str) -> None:
    """Refuses options, at any depth, that the run's config decides."""
    for name, value in options.items():
        if name in REFUSED_OPTIONS:
            raise InputError(
                f"{where}: expected no option {name!r}, found {value!r}: {REFUSED_OPTIONS[name]}"
            )
        if name == "use_cache" and value:
            raise InputError(
                f"{where}: expected no option 'use_cache', found {value!r}: towers never cache "
                "keys and values; remove it"
            )
        if isinstance(value, dict):
            _refuse_options(value, where)


def refuse_quantized_weights(backbone: nn.Module, where: str) -> None:
    """Refuses weights that are integers.

    Raises:
        InputError: if a parameter is not of a floating-point type.
    """
    for name, parameter in backbone.named_parameters():
        if not parameter.is_floating_point():
            raise InputError(
                f"{where}: expected floating-point weights, found {parameter.dtype} in {name}; "
                "load weights that are not quantized"
            )


def _turn_off_caches(backbone: nn.Module) -> None:
    """Stops decoders of transformers from caching keys and values, for which they have no use.

    A block that recomputes its activations would append to the cache a second time.
    """
    for module in backbone.modules():
        settings = getattr(module, "config", None)
        if getattr(settings, "use_cache", False):
            settings.use_cache = False


def _refuse_small_vocabulary(backbone: nn.Module, tokenizer: Tokenizer, config: TextTower) -> None:
    table = _token_embedding(backbone)
    if isinstance(table, nn.Embedding) and table.num_embeddings <= tokenizer.largest_id:
        raise InputError(
            f"model.text: the tower has embeddings of {table.num_embeddings} tokens, but the "
            f"largest token id of the tokenizer is {tokenizer.largest_id}; set "
            f"model.text.tokenizer to the tokenizer of {config.name!r}, or set options: "
            f"{{vocab_size: {tokenizer.largest_id + 1}}} if the tower is trained from scratch"
        )


def _token_embedding(backbone: nn.Module) -> nn.Module | None:
    if hasattr(backbone, "token_embedding"):  # open_clip's text transformer
        return backbone.token_embedding
    inner = backbone.backbone if isinstance(backbone, TransformersText) else backbone.transformer
    try:
        return inner.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # characters are hashed instead of looked up
        return None


def _refuse_batch_norm(backbone: nn.Module, where: str) -> None:
    """Refuses batch norm: a rank's own statistics make the result depend on the number of ranks."""
    for name, module in backbone.named_modules():
        if isinstance(module, _BatchNorm) and not has_frozen_statistics(module):
            raise InputError(
                f"{where}: layer {name} is a {type(module).__name__}, whose output depends on "
                "which samples share a process; set batch_norm: frozen to train it with fixed "
                "statistics, freeze the tower (frozen: true), or choose a model without it"
            )


def probe_backbone(
    backbone: nn.Module, examples: Tensor, *, where: str, drop_keys: TowerDropKeys | None = None
) -> int:
    """Determines the output width W of a backbone and freezes its unused parameters.

    Libraries build heads that pooled features never pass through, but engines wait for the gradient
    of every parameter that is not frozen. On the meta device there are no values: only shapes are
    determined.

    Args:
        backbone: backbone from `build_media_backbone` or `build_text_backbone`.
        examples: two different inputs.
        where: config key of the tower.
        drop_keys: keys of the dropout layers of a trained tower; None for a frozen tower.

    Raises:
        InputError: if the backbone does not accept the input or does not return [B, W], or if its
            random numbers depend on the batch.
    """
    was_training = backbone.training
    try:
        if examples.is_meta:
            key = torch.zeros(1, dtype=torch.int64, device="cpu")
            with (drop_keys or TowerDropKeys()).set_pairs(key):
                output = run_on_fakes(backbone, examples[:1])
        elif drop_keys is None:
            with refuse_other_randomness(backbone.eval(), where=where):
                output = backbone(examples[:1])
        else:
            check_rows_of_samples(backbone.eval(), examples, where=where)
            output = _output_in_training(backbone.train(), examples[:1], drop_keys, where=where)
    except InputError:
        raise
    except Exception as error:  # libraries raise errors of any type
        raise InputError(
            f"{where}: cannot encode input {list(examples[:1].shape)}: "
            f"{describe_library_error(error)}{_SIZE_ADVICE.get(where, '')}"
        ) from error
    features = pooled(backbone, output)
    if not isinstance(features, Tensor):
        raise InputError(
            f"{where}: expected features [B, W] of input {list(examples[:1].shape)}, found a "
            f"{type(features).__name__}; choose a model whose tower returns one tensor"
        )
    if features.requires_grad:
        _freeze_unused(backbone, [output] if isinstance(output, Tensor) else output)
    backbone.train(was_training)
    if features.ndim != 2:
        raise InputError(
            f"{where}: expected features [B, W] of input {list(examples[:1].shape)}, found "
            f"{list(features.shape)}"
        )
    return features.shape[-1]


def _freeze_unused(backbone: nn.Module, outputs: Sequence[Tensor]) -> None:
    sum(each.sum() for each in outputs).backward()
    unused = [p for p in backbone.parameters() if p.requires_grad and p.grad is None]
    for parameter in unused:
        parameter.requires_grad_(False)
    backbone.zero_grad()


def _output_in_training(
    backbone: nn.Module, example: Tensor, drop_keys: TowerDropKeys, *, where: str
) -> Any:
    """Output of a backbone as in training; refuses layers that draw from a random generator."""
    keys = _first_key(example)
    with refuse_other_randomness(backbone, where=where), drop_keys.set_pairs(keys):
        return backbone(example)


def _first_key(examples: Tensor) -> Tensor:
    """int64 [1], the key of dropout of a first example"""
    return torch.zeros(1, dtype=torch.int64, device=examples.device)


def ends_in_joint_space(config: TowerConfig) -> bool:
    """Returns whether the backbone includes a projection, as open_clip's models do."""
    if config.projection == "none":
        return True
    return config.library == "open_clip" and config.name != FROM_SCRATCH_TEXT


def tower_folder(assets: Path, name: str) -> Path:
    """Returns the folder of a tower's config among a checkpoint's assets."""
    return assets / f"{name}_tower"


def save_tower_config(backbone: nn.Module, assets: Path, *, name: str) -> None:
    """Writes the config of a transformers model or of word vectors, for rebuilding the tower."""
    if isinstance(backbone, TransformersMedia | TransformersText):
        backbone.backbone.config.save_pretrained(str(tower_folder(assets, name)))
    save_sizes(backbone, tower_folder(assets, name))
