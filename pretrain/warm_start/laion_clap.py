"""LAION-CLAP's checkpoints in the names of transformers' ClapModel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from data_prep.errors import ConfigError
from pretrain.model.log_mel import LogMelSpectrogram
from pretrain.warm_start.weights import Weight, Weights

# Names in LAION's HTSAT -> names in ClapAudioModel, in this order.
_AUDIO_NAMES = (
    ("attn.", "attention.self."),
    ("self.proj.", "output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("bn0.", "batch_norm."),
)
_PROJECTION = re.compile(r"(audio|text)_projection\.([02])\.(weight|bias)")
_LINEAR = {"0": "linear1", "2": "linear2"}
# [fft / 2 + 1, F], the filters that the model was trained with
FILTER_BANK = "audio_branch.logmel_extractor.melW"
BANK_TOLERANCE = 2e-4  # of the largest filter; 1e-3 dB
_QKV = re.compile(r"(.*\.)qkv(\.(?:weight|bias))")


def is_laion_clap(names: Iterable[str]) -> bool:
    """Returns whether tensors are named as in LAION-CLAP."""
    return any(name.startswith(("audio_branch.", "text_branch.")) for name in names)


def to_transformers_names(weights: Weights) -> Weights:
    """Renames the tensors that ClapModel has, and splits the joint query, key and value.

    Tensors without a counterpart, such as the classifier of sounds, keep their names.
    """
    found: Weights = {}
    for name, weight in weights.items():
        new = _renamed(name)
        joint = _QKV.fullmatch(new)
        if joint is None:
            found[new] = weight
            continue
        for part, tensor in zip(("query", "key", "value"), weight.tensor.chunk(3), strict=True):
            found[f"{joint[1]}{part}{joint[2]}"] = Weight(weight.names, tensor)
    return found


def _renamed(name: str) -> str:
    first, _, rest = name.partition(".")
    if first == "text_branch":
        return f"text_model.{rest}"
    if first == "audio_branch":
        for old, new in _AUDIO_NAMES:
            # Whole components of the name: "attn." is not the end of "cross_attn.".
            rest = re.sub(rf"(^|\.){re.escape(old)}", rf"\g<1>{new}", rest)
        return f"audio_model.audio_encoder.{rest}"
    projection = _PROJECTION.fullmatch(name)
    if projection:
        return f"{projection[1]}_projection.{_LINEAR[projection[2]]}.{projection[3]}"
    return name


def refuse_other_spectrogram(
    tensors: Mapping[str, Tensor], input_stage: nn.Module, *, where: str
) -> None:
    """Compares the filter bank in a checkpoint with that of a tower, if there is one in both.

    The Slaney and HTK scales are 23 dB apart on average, and no tensor has another shape.

    Args:
        tensors: tensors of the checkpoint.
        input_stage: input stage of the tower.
        where: config key and value of the source, for messages.

    Raises:
        ConfigError: if the tower's spectrogram is not the one that the model was trained with.
    """
    if FILTER_BANK not in tensors or not isinstance(input_stage, LogMelSpectrogram):
        return
    expected, found = tensors[FILTER_BANK].float().T, input_stage.bank.float()
    settings = input_stage.settings
    is_raw = (settings.mean_db, settings.std_db, settings.frontend) == (0.0, 1.0, "decibel")
    if expected.shape == found.shape and is_raw:
        difference = (expected - found).abs().max().item()
        if difference <= BANK_TOLERANCE * expected.max().item():
            return
    num_bins, num_frequencies = expected.shape
    raise ConfigError(
        f"{where}: expected the spectrogram that the model was trained with (decibels without mean "
        f"and deviation, the {num_bins} filters of {FILTER_BANK}), found another one in "
        "audio.log_mel; LAION's recipes set audio: {sample_rate_hz: 48000, log_mel: {fft_samples: "
        f"{2 * (num_frequencies - 1)}, hop_samples: 480, num_mel_bins: {num_bins}, low_hz: 50, "
        "high_hz: 14000, mel_scale: slaney, mel_norm: slaney, mean_db: 0, std_db: 1}}"
    )
