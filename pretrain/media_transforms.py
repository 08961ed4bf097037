"""From decoded media to tensors of one shape: the random form for training, the fixed for the rest.

A transform has three methods of its own kind of media:

    decode(content, extension)   bytes -> decoded image or waveform
    augment(decoded, rng)        training: randomness only from rng
    transform(decoded)           evaluation: no randomness
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_prep.media_decode import decode_audio, decode_image
from pretrain.config import AudioTransform, ImageTransform, MediaKind, PretrainConfig
from pretrain.keyed_random import SampleRandom

# Of longer images only the centre is resized: it is all that the crop keeps, and a picture one
# pixel high would else grow without bound.
LONGEST_RATIO = 8


def _central_part(image: np.ndarray, *, longest: int) -> np.ndarray:
    """The centre of an image, at most `longest` pixels in height and width."""
    top, left = (max(0, side - longest) // 2 for side in image.shape[:2])
    return image[top : top + longest, left : left + longest]


@dataclass(frozen=True)
class TrainingExample:
    """One augmented image or clip."""

    values: Tensor
    stripes: list[tuple[int, int]]


class ImageToPixels:
    """Images to uint8 [3, size, size]; normalisation follows on the device."""

    def __init__(self, config: ImageTransform) -> None:
        self.config = config
        self.row_shape = (config.size, config.size, 3)
        self.row_dtype = torch.uint8
        self.num_stripes = 0

    def load_training(self, content, extension, rng):
        return TrainingExample(
            self.augment(self.decode(content, extension), rng).permute(1, 2, 0), []
        )

    def decode(self, content: bytes, extension: str) -> np.ndarray:
        """uint8 [H, Wd, 3].

        Raises:
            data_prep.media_decode.MediaError: damaged bytes, or too many pixels.
        """
        return decode_image(content, extension)

    def augment(self, image: np.ndarray, rng: SampleRandom) -> Tensor:
        """uint8 [H, Wd, 3] -> uint8 [3, size, size]: a random crop, resized, perhaps mirrored."""
        top, left, height, width = self._random_crop(*image.shape[:2], rng)
        pixels = self._resize(image[top : top + height, left : left + width], self._square)
        if rng.random() < self.config.flip_probability:
            pixels = pixels.flip(-1)
        return pixels.contiguous()

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
        pixels = torch.from_numpy(np.require(image, requirements="CW")).permute(
            2, 0, 1
        )  # -> [3, H, Wd]
        if pixels.shape[1:] == size:
            return pixels
        return functional.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]


class AudioToWaveform:
    """Clips to float32 [samples] of one length; the log-mel follows on the device."""

    def __init__(self, config: AudioTransform) -> None:
        self.config = config
        self.clip_samples = round(config.clip_seconds * config.sample_rate_hz)
        self.row_shape = (self.clip_samples,)
        self.row_dtype = torch.float32
        self.num_stripes = 0

    def load_training(self, content, extension, rng):
        return TrainingExample(self.augment(self.decode(content, extension), rng), [])

    def decode(self, content: bytes, extension: str) -> np.ndarray:
        """float32 [samples], mono, at sample_rate_hz.

        Raises:
            data_prep.media_decode.MediaError: damaged bytes, or too long a clip.
        """
        return decode_audio(content, sample_rate_hz=self.config.sample_rate_hz)

    def augment(self, waveform: np.ndarray, rng: SampleRandom) -> Tensor:
        """float32 [samples] -> float32 [clip_samples]: cropped anywhere."""
        return self._cut(waveform, int(rng.random() * (self._surplus(waveform) + 1)))

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


MediaTransform = ImageToPixels | AudioToWaveform


def build_transforms(config: PretrainConfig) -> dict[MediaKind, MediaTransform]:
    """The transform of every kind of media that the model has a tower for."""
    transforms: dict[MediaKind, MediaTransform] = {}
    if config.model.image is not None:
        transforms["image"] = ImageToPixels(config.image)
    if config.model.audio is not None:
        transforms["audio"] = AudioToWaveform(config.audio)
    return transforms
