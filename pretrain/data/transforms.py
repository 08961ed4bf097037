"""Transforms of media: bytes -> tensors of one shape, random in training, fixed in evaluation.

A transform has these methods for its kind of media. Randomness comes from rng alone.

    decode_training(content, extension, rng)   training: bytes -> random crop or part
    write_row(part, rng, row)                  training: that part -> one row of a batch, in place
    decode(content, extension)                 evaluation: bytes -> decoded image or waveform
    transform(decoded)                         evaluation: decoded -> the tower's input
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data_prep.media.decode import (
    JPEG_EXTENSIONS,
    PixelMemory,
    decode_audio,
    decode_audio_part,
    decode_image,
    jpeg_size,
)
from pretrain.sampling.keyed_random import SampleRandom
from pretrain.settings.model import Model
from pretrain.settings.transforms import AudioTransform, ColorJitter, ImageTransform

# Of longer images, only the centre is resized: the crop keeps no more, and a picture one pixel high
# would otherwise grow without bound.
LONGEST_RATIO = 8
JPEG_DENOMINATORS = (8, 4, 2)


def _central_part(image: np.ndarray, *, longest: int) -> np.ndarray:
    """The centre of an image, at most `longest` pixels in height and width."""
    top, left = (max(0, side - longest) // 2 for side in image.shape[:2])
    return image[top : top + longest, left : left + longest]


class ImageToPixels:
    """Transform of images to uint8 [3, size, size]; normalisation follows on the device."""

    def __init__(self, config: ImageTransform) -> None:
        self.config = config
        # One row of a training batch; channels are last in memory.
        self.row_shape: tuple[int, ...] = (config.size, config.size, 3)
        self.row_dtype = torch.uint8
        self.num_masks = 0
        self._memory = PixelMemory()

    def decode(self, content: bytes, extension: str) -> np.ndarray:
        """Decodes a picture to uint8 [H, Wd, 3].

        Raises:
            data_prep.media.decode.MediaError: if bytes are damaged, or there are too many pixels.
        """
        return decode_image(content, extension)

    def decode_training(self, content: bytes, extension: str, rng: SampleRandom) -> np.ndarray:
        """Decodes a random crop.

        Random numbers are taken in this order, also those of what is turned off: four here for the
        crop. In `write_row` follow one each for mirroring and grey, and five for any jitter.

        Returns:
            uint8 [crop height, crop width, 3].

        Raises:
            data_prep.media.decode.MediaError: if bytes are damaged, or there are too many pixels.
        """
        # A copy, because the next picture is decoded into the same memory.
        return self._cropped(content, extension, rng).copy()

    def write_row(self, part: np.ndarray, rng: SampleRandom, row: Tensor) -> list[tuple[int, int]]:
        """Writes a crop into a row: resized, and at random mirrored and of other colours.

        Args:
            part: uint8 [crop height, crop width, 3], as `decode_training` returns it.
            rng: random numbers of the sample, after `decode_training`.
            row: uint8 [size, size, 3], which is filled.

        Returns:
            No masks.
        """
        is_mirrored = rng.random() < self.config.flip_probability
        is_grey = rng.random() < self.config.grey_probability
        if not (is_mirrored or is_grey or self.config.color_jitter):
            self._resize_into(row, part)
            return []
        pixels = self._resize(part, self._square)
        if is_mirrored:
            pixels = pixels.flip(-1)
        if self.config.color_jitter is not None:
            pixels = _jittered(pixels, self.config.color_jitter, rng)
        if is_grey:
            pixels = _grey(pixels)
        row.copy_(pixels.permute(1, 2, 0))
        return []

    def __call__(self, image: np.ndarray) -> Tensor:
        """uint8 [H, Wd, 3] (or a PIL image) -> uint8 [3, size, size]."""
        if not isinstance(image, np.ndarray):
            image = np.asarray(image.convert("RGB"))
        if self.config.resize == "squash":
            return self._resize(image, self._square).contiguous()
        size = self.config.size
        shorter = min(image.shape[:2])
        image = _central_part(image, longest=LONGEST_RATIO * shorter)
        shorter_side = int(size / self.config.crop_fraction)
        whole = round if self.config.longer_side == "round" else int
        height, width = (
            max(shorter_side, whole(shorter_side * side / shorter)) for side in image.shape[:2]
        )
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
        """Largest denominator at which a decoded crop still has `size` pixels."""
        factor = min(height, width) // self.config.size
        return next((each for each in JPEG_DENOMINATORS if each <= factor), 1)

    def _random_crop(self, height: int, width: int, rng: SampleRandom) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop of random area and aspect ratio."""
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

    def _resize(self, image: np.ndarray, size: tuple[int, int]) -> Tensor:
        """uint8 [H, Wd, 3] -> uint8 [3, *size], antialiased; within one level of PIL's."""
        pixels = torch.empty(*size, 3, dtype=torch.uint8)
        self._resize_into(pixels, np.require(image, requirements="CW"))
        return pixels.permute(2, 0, 1)

    def _resize_into(self, row: Tensor, image: np.ndarray) -> None:
        """Resizes a contiguous image of any size into a row, uint8 [H, Wd, 3]."""
        # With a batch axis: without it, torch resizes three planes, which is slower.
        pixels = torch.from_numpy(image[None].transpose(0, 3, 1, 2))  # [1, 3, H, Wd], channels last
        # torch's interpolate calls these functions, but has no `out`.
        _RESIZE[self.config.interpolation](
            pixels, row.shape[:2], False, None, out=row[None].permute(0, 3, 1, 2)
        )


_RESIZE = {
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,
}


def _jittered(pixels: Tensor, jitter: ColorJitter, rng: SampleRandom) -> Tensor:
    """uint8 [3, H, Wd] with random brightness, contrast, saturation and hue."""
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
    """Torchvision's adjust_contrast with the exact mean.

    Torchvision's mean is a float sum, which depends on the number of threads.
    """
    from torchvision.transforms.v2 import functional as colors  # slow to import

    grey = colors.rgb_to_grayscale(pixels)  # [3, H, Wd] -> [1, H, Wd]
    mean = grey.sum(dtype=torch.int64).item() / grey.numel()
    return (pixels * factor + (1 - factor) * mean).clamp_(0, 255).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """uint8 [3, H, Wd] with three equal channels."""
    from torchvision.transforms.v2 import functional as colors  # slow to import

    return colors.rgb_to_grayscale(pixels, num_output_channels=3)


class AudioToWaveform:
    """Transform of clips to float32 [samples] of one length; log-mel follows on the device."""

    def __init__(self, config: AudioTransform) -> None:
        self.config = config
        self.clip_samples = config.clip_samples
        self.row_shape: tuple[int, ...] = (self.clip_samples,)
        self.row_dtype = torch.float32
        spec = config.spec_augment
        self.num_masks = spec.num_mel_stripes + spec.num_time_stripes if spec else 0

    def decode(self, content: bytes, extension: str) -> np.ndarray:
        """Decodes a clip to float32 [samples], mono, at sample_rate_hz.

        Raises:
            data_prep.media.decode.MediaError: if bytes are damaged, or the clip is too long.
        """
        return decode_audio(content, sample_rate_hz=self.config.sample_rate_hz)

    def decode_training(self, content: bytes, extension: str, rng: SampleRandom) -> np.ndarray:
        """Decodes a random part of a clip.

        Random numbers are taken in this order: one here for the part, and in `write_row` two for
        each mask.

        Returns:
            float32 [at most clip_samples].

        Raises:
            data_prep.media.decode.MediaError: if bytes are damaged, or the clip is too long.
        """
        return decode_audio_part(
            content,
            sample_rate_hz=self.config.sample_rate_hz,
            num_samples=self.clip_samples,
            place=rng.random(),
        )

    def write_row(self, part: np.ndarray, rng: SampleRandom, row: Tensor) -> list[tuple[int, int]]:
        """Writes a part of a clip into a row, padded to its length.

        Args:
            part: float32 [at most clip_samples], as `decode_training` returns it.
            rng: random numbers of the sample, after `decode_training`.
            row: float32 [clip_samples], which is filled.

        Returns:
            [num_masks] (start, width) of SpecAugment's masks, frequency masks first.
        """
        row.copy_(self._cut(part, 0))
        return self._masks(rng)

    def _masks(self, rng: SampleRandom) -> list[tuple[int, int]]:
        """(start, width) of SpecAugment's masks, frequency masks first."""
        spec, mel = self.config.spec_augment, self.config.log_mel
        if spec is None:
            return []
        freq_masks = [
            _mask(mel.num_mel_bins, spec.mel_bins, rng) for _ in range(spec.num_mel_stripes)
        ]
        time_masks = [
            _mask(self.config.num_frames, spec.frames, rng) for _ in range(spec.num_time_stripes)
        ]
        return freq_masks + time_masks

    def __call__(self, waveform: np.ndarray) -> Tensor:
        """float32 [samples] -> float32 [clip_samples]: the centre of a longer clip."""
        return self._cut(waveform, self._surplus(waveform) // 2)

    def _surplus(self, waveform: np.ndarray) -> int:
        return max(0, len(waveform) - self.clip_samples)

    def _cut(self, waveform: np.ndarray, start: int) -> Tensor:
        clip = waveform[start : start + self.clip_samples]
        if len(clip) and self.config.padding == "repeatpad":
            clip = np.tile(clip, self.clip_samples // len(clip))
        missing = self.clip_samples - len(clip)
        if missing:
            clip = np.pad(clip, (0, missing), mode="wrap" if self._repeats else "constant")
        return torch.from_numpy(np.ascontiguousarray(clip, dtype=np.float32))

    @property
    def _repeats(self) -> bool:
        return self.config.padding == "repeat"


def _mask(length: int, max_width: int, rng: SampleRandom) -> tuple[int, int]:
    """(start, width) of a mask within `length`."""
    width = rng.below(max_width + 1)
    return rng.below(length - width + 1), width


MediaTransform = ImageToPixels | AudioToWaveform


def build_transforms(
    model: Model, *, image: ImageTransform, audio: AudioTransform
) -> dict[str, MediaTransform]:
    """Builds the transform of every kind of media that a model has modalities of.

    Args:
        model: section `model`.
        image: section `image`.
        audio: section `audio`.
    """
    kinds, transforms = set(model.kinds.values()), {}
    if "image" in kinds:
        transforms["image"] = ImageToPixels(image)
    if "audio" in kinds:
        transforms["audio"] = AudioToWaveform(audio)
    return transforms


def build_transforms_by_step(
    model: Model, *, image: ImageTransform, audio: AudioTransform
) -> dict[int, dict[str, MediaTransform]]:
    """Returns {number of steps done: transforms from then on}; the first number is 0.

    Args:
        model: section `model`.
        image: section `image`, whose segments may change the size.
        audio: section `audio`.
    """
    return {
        step: build_transforms(model, image=image.at_step(step), audio=audio)
        for step in image.sizes
    }
