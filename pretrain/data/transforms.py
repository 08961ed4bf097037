"""From the bytes of media to tensors of one shape: at random for training, fixed for the rest.

A transform has these methods, each for its own kind of media; chance comes only from rng:

    decode_training(content, extension, rng)   bytes -> the decoded part that is shown
    write_row(part, rng, row)                  that part -> one row of a batch, in its place
    load_training(content, extension, rng)     both: bytes -> a row in memory of its own
    decode(content, extension)                 evaluation: bytes -> decoded image or waveform
    transform(decoded)                         evaluation: decoded -> the tower's input, no chance
"""

from __future__ import annotations

import math
from typing import NamedTuple

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
from pretrain.config import (
    AudioTransform,
    ColorJitter,
    ImageTransform,
    MediaKind,
    PretrainConfig,
)
from pretrain.sampling.keyed_random import SampleRandom

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
            data_prep.media.decode.MediaError: damaged bytes, or too many pixels.
        """
        return decode_image(content, extension)

    def load_training(self, content: bytes, extension: str, rng: SampleRandom) -> TrainingExample:
        """uint8 [size, size, 3]: a random crop, resized, perhaps mirrored and of other colours.

        Numbers are taken from `rng` in this order, those of what is turned off too: four for the
        crop, one each for mirroring and grey, and last, if there is any jitter, five for it.

        Raises:
            data_prep.media.decode.MediaError: damaged bytes, or too many pixels.
        """
        return _load_training(self, content, extension, rng)

    def decode_training(self, content: bytes, extension: str, rng: SampleRandom) -> np.ndarray:
        """uint8 [crop height, crop width, 3]: the first part of load_training."""
        return self._cropped(content, extension, rng).copy()  # the picture's memory is used again

    def write_row(self, part: np.ndarray, rng: SampleRandom, row: Tensor) -> list[tuple[int, int]]:
        """The second part of load_training: fills uint8 [size, size, 3]; there are no stripes."""
        is_mirrored = rng.random() < self.config.flip_probability
        is_grey = rng.random() < self.config.grey_probability
        if not (is_mirrored or is_grey or self.config.color_jitter):
            _resize_into(row, part)
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
        pixels = torch.empty(*size, 3, dtype=torch.uint8)
        _resize_into(pixels, np.require(image, requirements="CW"))
        return pixels.permute(2, 0, 1)


def _resize_into(row: Tensor, image: np.ndarray) -> None:
    """Fills uint8 [H, Wd, 3] with an image of any size, which is one piece of memory."""
    # With the batch's axis in front: else torch takes three slow planes for one fast picture.
    pixels = torch.from_numpy(image[None].transpose(0, 3, 1, 2))  # [1, 3, H, Wd], channels last
    # What torch's interpolate calls; but that has no `out`.
    torch._C._nn._upsample_bicubic2d_aa(
        pixels, row.shape[:2], False, None, out=row[None].permute(0, 3, 1, 2)
    )


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
            data_prep.media.decode.MediaError: damaged bytes, or too long a clip.
        """
        return decode_audio(content, sample_rate_hz=self.config.sample_rate_hz)

    def load_training(self, content: bytes, extension: str, rng: SampleRandom) -> TrainingExample:
        """float32 [clip_samples]: any part of a longer clip, and SpecAugment's stripes.

        Numbers are taken from `rng` in this order: one for the part, two for each stripe.

        Raises:
            data_prep.media.decode.MediaError: damaged bytes, or too long a clip.
        """
        return _load_training(self, content, extension, rng)

    def decode_training(self, content: bytes, extension: str, rng: SampleRandom) -> np.ndarray:
        """float32 [at most clip_samples]: the first part of load_training."""
        return decode_audio_part(
            content,
            sample_rate_hz=self.config.sample_rate_hz,
            num_samples=self.clip_samples,
            place=rng.random(),
        )

    def write_row(self, part: np.ndarray, rng: SampleRandom, row: Tensor) -> list[tuple[int, int]]:
        """The second part of load_training: fills float32 [clip_samples], returns the stripes."""
        row.copy_(self._cut(part, 0))
        return self._stripes(rng)

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


def _load_training(
    transform: MediaTransform, content: bytes, extension: str, rng: SampleRandom
) -> TrainingExample:
    part = transform.decode_training(content, extension, rng)
    row = torch.empty(transform.row_shape, dtype=transform.row_dtype)
    return TrainingExample(row, transform.write_row(part, rng, row))


def build_transforms(config: PretrainConfig) -> dict[MediaKind, MediaTransform]:
    """The transform of every kind of media that the model has a tower for."""
    transforms: dict[MediaKind, MediaTransform] = {}
    if config.model.image is not None:
        transforms["image"] = ImageToPixels(config.image)
    if config.model.audio is not None:
        transforms["audio"] = AudioToWaveform(config.audio)
    return transforms
