"""From the bytes of media to tensors of one shape: at random for training, fixed for the rest.

A transform has three methods, each for its own kind of media:

    load_training(content, extension, rng)   bytes -> one row of a batch; chance only from rng
    decode(content, extension)               evaluation: bytes -> decoded image or waveform
    transform(decoded)                       evaluation: decoded -> the tower's input, no chance
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_prep.media_decode import (
    JPEG_EXTENSIONS,
    PixelMemory,
    decode_audio,
    decode_audio_part,
    decode_image,
    jpeg_size,
)
from pretrain.config import (
    AudioTransform,
    ColorJitter,
    ImageTransform,
    MediaKind,
    PretrainConfig,
)
from pretrain.keyed_random import SampleRandom

# Of longer images only the centre is resized: it is all that the crop keeps, and a picture one
# pixel high would else grow without bound.
LONGEST_RATIO = 8
JPEG_DENOMINATORS = (8, 4, 2)


class TrainingExample(NamedTuple):
    """One row of a batch's media."""

    values: Tensor  # of the transform's row_shape and row_dtype
    stripes: list[tuple[int, int]]  # start and width of each of SpecAugment's stripes


def _central_part(image: np.ndarray, *, longest: int) -> np.ndarray:
    """The centre of an image, at most `longest` pixels in height and width."""
    top, left = (max(0, side - longest) // 2 for side in image.shape[:2])
    return image[top : top + longest, left : left + longest]


class ImageToPixels:
    """Images to uint8 [3, size, size]; normalisation follows on the device."""

    def __init__(self, config: ImageTransform) -> None:
        self.config = config
        # Of one row of a training batch; channels are last in memory.
        self.row_shape: tuple[int, ...] = (config.size, config.size, 3)
        self.row_dtype = torch.uint8
        self.num_stripes = 0
        self._memory = PixelMemory()

    def decode(self, content: bytes, extension: str) -> np.ndarray:
        """uint8 [H, Wd, 3].

        Raises:
            data_prep.media_decode.MediaError: damaged bytes, or too many pixels.
        """
        return decode_image(content, extension)

    def load_training(self, content: bytes, extension: str, rng: SampleRandom) -> TrainingExample:
        """uint8 [size, size, 3]: a random crop, resized, perhaps mirrored and of other colours.

        Numbers are taken from `rng` in this order, those of what is turned off too: four for the
        crop, one each for mirroring and grey, and last, if there is any jitter, five for it.

        Raises:
            data_prep.media_decode.MediaError: damaged bytes, or too many pixels.
        """
        pixels = self._resize(self._cropped(content, extension, rng), self._square)
        is_mirrored = rng.random() < self.config.flip_probability
        is_grey = rng.random() < self.config.grey_probability
        if is_mirrored:
            pixels = pixels.flip(-1)
        if self.config.color_jitter is not None:
            pixels = _jittered(pixels, self.config.color_jitter, rng)
        if is_grey:
            pixels = _grey(pixels)
        return TrainingExample(pixels.permute(1, 2, 0).contiguous(), [])

    def __call__(self, image: np.ndarray) -> Tensor:
        """uint8 [H, Wd, 3] (or a PIL image) -> uint8 [3, size, size]."""
        if not isinstance(image, np.ndarray):
            image = np.asarray(image.convert("RGB"))
        if self.config.resize == "squash":
            return self._resize(image, self._square).contiguous()
        size = self.config.size
        shorter = min(image.shape[:2])
        image = _central_part(image, longest=LONGEST_RATIO * shorter)
        height, width = (max(size, round(side * size / shorter)) for side in image.shape[:2])
        pixels = self._resize(image, (height, width))
        top, left = (height - size) // 2, (width - size) // 2
        return pixels[:, top : top + size, left : left + size].contiguous()

    @property
    def _square(self) -> tuple[int, int]:
        return self.config.size, self.config.size

    def _cropped(self, content: bytes, extension: str, rng: SampleRandom) -> np.ndarray:
        """uint8 [crop height, crop width, 3]: a random part of the picture."""
        if not self.config.scaled_decoding or extension not in JPEG_EXTENSIONS:
            image = decode_image(content, extension, memory=self._memory)
            top, left, height, width = self._random_crop(*image.shape[:2], rng)
            return image[top : top + height, left : left + width]
        full_height, full_width = jpeg_size(content)
        top, left, height, width = self._random_crop(full_height, full_width, rng)
        denominator = self._denominator(height, width)
        image = decode_image(content, extension, denominator=denominator, memory=self._memory)
        if image.shape[0] == full_height:
            denominator = 1
        top, bottom, left, right = (
            (edge + denominator // 2) // denominator
            for edge in (top, top + height, left, left + width)
        )
        return image[top:bottom, left:right]

    def _denominator(self, height: int, width: int) -> int:
        """The largest by which a crop can be decoded smaller and still have `size` pixels."""
        factor = min(height, width) // self.config.size
        return next((each for each in JPEG_DENOMINATORS if each <= factor), 1)

    def _random_crop(self, height: int, width: int, rng: SampleRandom) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop of random area and shape, within the image."""
        low_area, high_area = self.config.crop_area
        low_ratio, high_ratio = self.config.crop_ratio
        area = height * width * (low_area + (high_area - low_area) * rng.random())
        log_ratio = math.log(low_ratio) + math.log(high_ratio / low_ratio) * rng.random()
        ratio = math.exp(log_ratio)
        crop_height = max(1, min(height, round(math.sqrt(area / ratio))))
        crop_width = max(1, min(width, round(math.sqrt(area * ratio))))
        top = int(rng.random() * (height - crop_height + 1))
        left = int(rng.random() * (width - crop_width + 1))
        return top, left, crop_height, crop_width

    @staticmethod
    def _resize(image: np.ndarray, size: tuple[int, int]) -> Tensor:
        """uint8 [H, Wd, 3] -> uint8 [3, *size], antialiased bicubic: PIL's, to within one level."""
        # Copied if it is a part, and with the batch's axis in front: else torch takes three slow
        # planes for one fast picture.
        pixels = torch.from_numpy(np.require(image, requirements="CW"))[None]
        pixels = pixels.permute(0, 3, 1, 2)  # [1, H, Wd, 3] -> [1, 3, H, Wd], channels last
        if pixels.shape[2:] == size:
            return pixels[0].clone()
        return functional.interpolate(pixels, size, mode="bicubic", antialias=True)[0]


def _jittered(pixels: Tensor, jitter: ColorJitter, rng: SampleRandom) -> Tensor:
    """uint8 [3, H, Wd] with brightness, contrast, saturation and hue changed at random."""
    from torchvision.transforms.v2 import functional as colors  # slow to import

    is_changed = rng.random() < jitter.probability
    brightness, contrast, saturation, hue = (2 * rng.random() - 1 for _ in range(4))
    if not is_changed:
        return pixels
    pixels = pixels.contiguous()  # channels first: a quarter faster here
    pixels = colors.adjust_brightness(pixels, 1 + jitter.brightness * brightness)
    pixels = _with_contrast(pixels, 1 + jitter.contrast * contrast)
    pixels = colors.adjust_saturation(pixels, 1 + jitter.saturation * saturation)
    return colors.adjust_hue(pixels, jitter.hue * hue) if jitter.hue else pixels


def _with_contrast(pixels: Tensor, factor: float) -> Tensor:
    """Torchvision's adjust_contrast, but with the exact mean: the float sum that torchvision takes
    depends on the number of threads."""
    from torchvision.transforms.v2 import functional as colors  # slow to import

    grey = colors.rgb_to_grayscale(pixels)  # [3, H, Wd] -> [1, H, Wd]
    mean = grey.sum(dtype=torch.int64).item() / grey.numel()
    return (pixels * factor + (1 - factor) * mean).clamp_(0, 255).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """uint8 [3, H, Wd] with three equal channels."""
    from torchvision.transforms.v2 import functional as colors  # slow to import

    return colors.rgb_to_grayscale(pixels, num_output_channels=3)


class AudioToWaveform:
    """Clips to float32 [samples] of one length; the log-mel follows on the device."""

    def __init__(self, config: AudioTransform) -> None:
        self.config = config
        self.clip_samples = round(config.clip_seconds * config.sample_rate_hz)
        self.row_shape: tuple[int, ...] = (self.clip_samples,)
        self.row_dtype = torch.float32
        spec = config.spec_augment
        self.num_stripes = spec.num_mel_stripes + spec.num_time_stripes if spec else 0

    def decode(self, content: bytes, extension: str) -> np.ndarray:
        """float32 [samples], mono, at sample_rate_hz.

        Raises:
            data_prep.media_decode.MediaError: damaged bytes, or too long a clip.
        """
        return decode_audio(content, sample_rate_hz=self.config.sample_rate_hz)

    def load_training(self, content: bytes, extension: str, rng: SampleRandom) -> TrainingExample:
        """float32 [clip_samples]: any part of a longer clip, and SpecAugment's stripes.

        Numbers are taken from `rng` in this order: one for the part, two for each stripe.

        Raises:
            data_prep.media_decode.MediaError: damaged bytes, or too long a clip.
        """
        waveform = decode_audio_part(
            content,
            sample_rate_hz=self.config.sample_rate_hz,
            num_samples=self.clip_samples,
            place=rng.random(),
        )
        return TrainingExample(self._cut(waveform, 0), self._stripes(rng))

    def _stripes(self, rng: SampleRandom) -> list[tuple[int, int]]:
        """(start, width) of SpecAugment's stripes, those across mel bins first."""
        spec, mel = self.config.spec_augment, self.config.log_mel
        if spec is None:
            return []
        num_frames = 1 + self.clip_samples // mel.hop_samples
        return [
            *(_stripe(mel.num_mel_bins, spec.mel_bins, rng) for _ in range(spec.num_mel_stripes)),
            *(_stripe(num_frames, spec.frames, rng) for _ in range(spec.num_time_stripes)),
        ]

    def __call__(self, waveform: np.ndarray) -> Tensor:
        """float32 [samples] -> float32 [clip_samples]: the centre of a longer clip."""
        return self._cut(waveform, self._surplus(waveform) // 2)

    def _surplus(self, waveform: np.ndarray) -> int:
        return max(0, len(waveform) - self.clip_samples)

    def _cut(self, waveform: np.ndarray, start: int) -> Tensor:
        clip = waveform[start : start + self.clip_samples]
        missing = self.clip_samples - len(clip)
        if missing:
            clip = np.pad(clip, (0, missing), mode="wrap" if self._repeats else "constant")
        return torch.from_numpy(np.ascontiguousarray(clip, dtype=np.float32))

    @property
    def _repeats(self) -> bool:
        return self.config.padding == "repeat"


def _stripe(length: int, max_width: int, rng: SampleRandom) -> tuple[int, int]:
    """(start, width) of a stripe within `length`."""
    width = rng.below(max_width + 1)
    return rng.below(length - width + 1), width


MediaTransform = ImageToPixels | AudioToWaveform


def build_transforms(config: PretrainConfig) -> dict[MediaKind, MediaTransform]:
    """The transform of every kind of media that the model has a tower for."""
    transforms: dict[MediaKind, MediaTransform] = {}
    if config.model.image is not None:
        transforms["image"] = ImageToPixels(config.image)
    if config.model.audio is not None:
        transforms["audio"] = AudioToWaveform(config.audio)
    return transforms
