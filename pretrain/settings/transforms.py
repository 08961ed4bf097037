"""Config sections `image` and `audio`: from decoded media to the inputs of towers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from data_prep.config_file import Section
from pretrain.settings.segments import check_rising_steps, value_at

Share = Annotated[float, Field(ge=0, le=1)]
# Mean and standard deviation of RGB in [0, 1] for CLIP's image towers (Radford et al. 2021).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ColorJitter(Section):
    """Colour jitter in training, in this order, as Pillow and torchvision define it.

    Each factor is drawn uniformly from [1 - x, 1 + x], the hue shift from [-x, x] turns.
    """

    probability: Share = 0.8  # fraction of images that are changed
    brightness: Share = 0.32
    contrast: Share = 0.32
    saturation: Share = 0.32
    hue: float = Field(0.08, ge=0, le=0.5)


class ImageSegment(Section):
    """Another size of images, or fraction of patches to drop, from a step on."""

    from_step: PositiveInt  # number of steps done before the segment
    size: PositiveInt | None = None  # pixels; null: as before
    # training: fraction of the patches that image towers with patch dropout drop; null: as before
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> ImageSegment:
        if self.size is None and self.patch_dropout is None:
            raise ValueError(f"the segment from step {self.from_step}: set size or patch_dropout")
        return self


class ImageTransform(Section):
    """Transform of a decoded image to the tower's square input."""

    size: PositiveInt = 224  # pixels; the towers' positions are those of this size
    # Cheap pretraining with small or masked images, and full images at the end (Li et al. 2023,
    # "FLIP", and "CLIPA"); more may be added while a run is stopped, none may change
    segments: list[ImageSegment] = []
    resize: Literal["shortest", "squash"] = "shortest"  # evaluation: shorter side, then centre crop
    # evaluation with shortest: size over the resized shorter side (timm's crop_pct)
    crop_fraction: float = Field(1.0, gt=0, le=1)
    # evaluation with shortest: how the longer side becomes a whole number of pixels; open_clip's,
    # timm's and transformers' processors truncate it
    longer_side: Literal["round", "truncate"] = "round"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # antialiased
    # training: fraction of the area kept
    crop_area: tuple[PositiveFloat, PositiveFloat] = (0.9, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)  # training: width over height
    flip_probability: Share = 0.0  # training: mirrored left to right
    color_jitter: ColorJitter | None = None  # training
    grey_probability: Share = 0.0  # training: converted to grey
    # JPEGs whose crop is at least twice `size` are decoded at 1/2, 1/4 or 1/8: faster, less exact.
    scaled_decoding: bool = False
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = CLIP_STD

    @field_validator("crop_area", "crop_ratio")
    @classmethod
    def _rising(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] > bounds[1]:
            raise ValueError(f"expected [low, high], found {list(bounds)}")
        return bounds

    @field_validator("segments")
    @classmethod
    def _in_order(cls, segments: list[ImageSegment]) -> list[ImageSegment]:
        check_rising_steps([segment.from_step for segment in segments], name="segments")
        return segments

    @property
    def sizes(self) -> dict[int, int]:
        """Number of steps done -> size from then on, for each change of the size."""
        sizes = {0: self.size}
        for segment in self.segments:
            if segment.size not in (None, list(sizes.values())[-1]):
                sizes[segment.from_step] = segment.size
        return sizes

    @property
    def patch_dropouts(self) -> dict[int, float]:
        """Number of steps done -> fraction of patches to drop from then on, set by a segment."""
        rates = {each.from_step: each.patch_dropout for each in self.segments}
        return {step: rate for step, rate in rates.items() if rate is not None}

    def at_step(self, step: int) -> ImageTransform:
        """Returns the settings of a step, without segments.

        Args:
            step: number of steps done before it.
        """
        size = value_at(self.sizes, step)
        return self.model_copy(update={"size": size, "segments": []})

    def after(self, num_steps: int) -> ImageTransform:
        """Returns the settings of the last of `num_steps` steps, without segments."""
        return self.at_step(max(0, num_steps - 1))


class LogMel(Section):
    """Log-mel spectrogram, standardised by constants.

    decibel: frames centred on multiples of hop_samples, in decibels (LAION-CLAP). whisper: the
    same without the last frame, as log10, at most 8 below the clip's maximum; mean_db: -4 and
    std_db: 4 are Whisper's. kaldi: whole frames without padding, without offset and pre-emphasised
    by 0.97, as natural logarithm (AST, ImageBind).
    """

    frontend: Literal["decibel", "whisper", "kaldi"] = "decibel"
    fft_samples: PositiveInt = 1024
    window_samples: PositiveInt | None = None  # length of the Hann window; null: fft_samples
    hop_samples: PositiveInt = 480
    num_mel_bins: PositiveInt = 64
    low_hz: float = Field(50.0, ge=0)
    high_hz: PositiveFloat = 14000.0
    mel_scale: Literal["htk", "slaney", "kaldi"] = "slaney"
    mel_norm: Literal["slaney"] | None = "slaney"  # null: triangles of height 1
    mean_db: float = -30.0  # subtracted, then divided by std_db; in the unit of the front end
    std_db: PositiveFloat = 20.0
    # frames are cut or padded at the end to this number, with silence (kaldi: 0); null: none
    num_frames: PositiveInt | None = None

    @model_validator(mode="after")
    def _fits_kaldi(self) -> LogMel:
        is_kaldi = self.frontend == "kaldi"
        if is_kaldi != (self.mel_scale == "kaldi") or (is_kaldi and self.mel_norm is not None):
            raise ValueError(
                f"frontend={self.frontend} with mel_scale={self.mel_scale} and "
                f"mel_norm={self.mel_norm}: frontend kaldi has mel_scale kaldi and mel_norm null, "
                "which no other front end has"
            )
        if self.frame_samples > self.fft_samples:
            raise ValueError(
                f"window_samples={self.window_samples} is longer than "
                f"fft_samples={self.fft_samples}; use at most that"
            )
        return self

    @property
    def frame_samples(self) -> int:
        """Length of the window."""
        return self.window_samples or self.fft_samples


class SpecAugment(Section):
    """Frequency and time masks, set to the spectrogram's mean (Park et al. 2019, "SpecAugment").

    Used in training only. First the width of a mask is drawn uniformly, then its position.
    """

    num_mel_stripes: int = Field(2, ge=0)  # frequency masks
    mel_bins: PositiveInt = 8  # largest width of a mask
    num_time_stripes: int = Field(2, ge=0)  # time masks
    frames: PositiveInt = 64  # largest width of a mask


class AudioTransform(Section):
    """Transform of a decoded clip to a waveform of fixed length, and to the tower's input."""

    sample_rate_hz: PositiveInt = 48000
    # longer clips are cropped: at a random position in training, at the centre in evaluation
    clip_seconds: PositiveFloat = 10.0
    # How shorter clips are filled up. repeat: cut in the last repetition; repeatpad: whole
    # repetitions, then silence (LAION-CLAP)
    padding: Literal["repeat", "repeatpad", "silence"] = "repeat"
    log_mel: LogMel = LogMel()
    spec_augment: SpecAugment | None = None  # training

    @property
    def clip_samples(self) -> int:
        """Length of a waveform."""
        return round(self.clip_seconds * self.sample_rate_hz)

    @property
    def num_frames(self) -> int:
        """Number of frames S of a spectrogram."""
        mel = self.log_mel
        if mel.num_frames is not None:
            return mel.num_frames
        if mel.frontend == "kaldi":
            return 1 + (self.clip_samples - mel.frame_samples) // mel.hop_samples
        return self.clip_samples // mel.hop_samples + (mel.frontend == "decibel")

    @model_validator(mode="after")
    def _below_nyquist(self) -> AudioTransform:
        if self.log_mel.high_hz > self.sample_rate_hz / 2:
            raise ValueError(
                f"log_mel.high_hz={self.log_mel.high_hz:g} is above half of "
                f"sample_rate_hz={self.sample_rate_hz}; use at most {self.sample_rate_hz / 2:g}"
            )
        if self.log_mel.low_hz >= self.log_mel.high_hz:
            raise ValueError(
                f"log_mel.low_hz={self.log_mel.low_hz:g} is not below "
                f"log_mel.high_hz={self.log_mel.high_hz:g}"
            )
        return self

    @model_validator(mode="after")
    def _holds_a_frame(self) -> AudioTransform:
        clip_samples = self.clip_seconds * self.sample_rate_hz
        if clip_samples < self.log_mel.fft_samples:
            raise ValueError(
                f"clip_seconds={self.clip_seconds:g} are {clip_samples:.0f} samples, fewer than "
                f"log_mel.fft_samples={self.log_mel.fft_samples}"
            )
        return self

    @model_validator(mode="after")
    def _masks_fit(self) -> AudioTransform:
        if self.spec_augment is None:
            return self
        for key, length in (("mel_bins", self.log_mel.num_mel_bins), ("frames", self.num_frames)):
            if (width := getattr(self.spec_augment, key)) > length:
                raise ValueError(
                    f"spec_augment.{key}={width} is wider than the spectrogram; use at most "
                    f"{length}"
                )
        return self
