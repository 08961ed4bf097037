"""Hugging Face's CLIP, SigLIP and CLAP, from a folder written by `save_pretrained`.

CLAP's feature extractor crops long clips at random, and its fused variant marks a random clip of
each batch as long. Embeddings would not be reproducible. Therefore clips are first cut into
windows of the tower's input length (see eval.models.preprocessing), which are never long.

SigLIP and SigLIP 2 were trained on lower-cased text. SiglipTokenizer lower-cases by itself, but
many folders of SigLIP 2 name GemmaTokenizer, which does not.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers.normalizers import Lowercase
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer

from data_prep.errors import InputError
from data_prep.media.decode import decode_audio
from eval.models.loaded_model import LoadedModel, ModelOrigin, normalized
from eval.models.model_source import ModelSource, checksum_of_files
from eval.models.open_clip_model import PilTransform
from pretrain.model.library_errors import describe_library_error

CLAP_TOKENS = 77  # text length in LAION's training; the tokenizer would allow 512


class HuggingFaceModel(torch.nn.Module):
    """Adapts a Hugging Face model to `encode`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def encode(self, modality: str, inputs: Any) -> Tensor:
        """Encodes a batch to L2-normalised [B, D].

        Args:
            modality: "image", "audio" or "text".
            inputs: images [B, 3, H, Wd], log-mels [B, 1 or 4, S, F], or the tokenizer's output.
        """
        encoders = {"image": self._image, "audio": self._audio, "text": self._text}
        return normalized(_pooled(encoders[modality](inputs)))

    def _image(self, pixels: Tensor) -> Any:
        return self.model.get_image_features(pixel_values=pixels)

    def _audio(self, log_mels: Tensor) -> Any:
        is_longer = torch.zeros(len(log_mels), 1, dtype=torch.bool, device=log_mels.device)
        return self.model.get_audio_features(log_mels, is_longer=is_longer)

    def _text(self, tokens: Any) -> Any:
        return self.model.get_text_features(**tokens)


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


class TextPreparation:
    """Tokenizer that pads all texts to the same length.

    Args:
        tokenizer: tokenizer of transformers.
        num_tokens: length of all texts.
        with_mask: False for SigLIP, which was trained to attend to padding.
        lower_case: True if texts must be lower-cased before the tokenizer.
    """

    def __init__(
        self, tokenizer: Any, *, num_tokens: int, with_mask: bool, lower_case: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.with_mask = with_mask
        self.lower_case = lower_case

    def settings(self) -> dict[str, Any]:
        """Returns the settings that are not in the tokenizer's files."""
        return {
            "num_tokens": self.num_tokens,
            "with_mask": self.with_mask,
            "lower_case": self.lower_case,
        }

    def __call__(self, texts: list[str]) -> Any:
        if self.lower_case:
            lower = Lowercase()  # of Siglip2Tokenizer; str.lower() differs for a final sigma
            texts = [lower.normalize_str(text) for text in texts]
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.num_tokens,
            return_tensors="pt",
        )
        wanted = ("input_ids", "attention_mask") if self.with_mask else ("input_ids",)
        return type(tokens)({name: tokens[name] for name in wanted})


class ClapTransform:
    """Transform of clips to log-mels with CLAP's own feature extractor."""

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor
        self.clip_samples = extractor.nb_max_samples

    def decode(self, content: bytes, extension: str) -> np.ndarray:
        """Decodes a clip to float32 [samples], mono, at the tower's sample rate.

        Raises:
            data_prep.media.decode.MediaError: if the bytes are damaged, or the clip is too long.
        """
        return decode_audio(content, sample_rate_hz=self.extractor.sampling_rate)

    def __call__(self, window: np.ndarray) -> Tensor:
        """Transforms float32 [<= clip_samples] to float32 [1 or 4, S, F]; repeats short clips."""
        found = self.extractor(
            window, sampling_rate=self.extractor.sampling_rate, return_tensors="pt"
        )
        return found["input_features"][0].float()


def load_hugging_face(source: ModelSource) -> LoadedModel:
    """Loads the model, its media transform and its tokenizer.

    Raises:
        InputError: if a file is missing, or transformers cannot read it.
    """
    folder = str(source.path)
    sha256 = checksum_of_files(source.path)
    try:
        model, unused = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        kind = model.config.model_type
        if kind == "clap":
            prepare = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
        else:
            prepare = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # libraries raise errors of any type
        raise InputError(
            f"{folder}: transformers cannot load it: {describe_library_error(error)}"
        ) from error
    if unused["missing_keys"]:  # transformers would initialise them randomly
        raise InputError(
            f"{folder}: the weights lack {sorted(unused['missing_keys'])[:5]} and others; copy all "
            "files of the model"
        )
    settings = json.loads(prepare.to_json_string())
    texts = TextPreparation(
        tokenizer,
        num_tokens=_num_tokens(model),
        with_mask=kind != "siglip",
        lower_case=kind == "siglip" and _must_be_lowered(tokenizer),
    )
    medium = "audio" if kind == "clap" else "image"
    return LoadedModel(
        HuggingFaceModel(model),
        {medium: medium, "text": "text"},
        {medium: ClapTransform(prepare) if kind == "clap" else _image_transform(prepare)},
        {medium: {"hugging_face": {k: v for k, v in settings.items() if k != "mel_filters"}}},
        texts,
        ModelOrigin("hugging_face", source.path, sha256, settings=texts.settings()),
    )


def _must_be_lowered(tokenizer: Any) -> bool:
    """Returns whether SigLIP's text must be lower-cased before this tokenizer.

    False if the tokenizer lower-cases by itself, or its config says `do_lower_case: false`.
    """
    if hasattr(tokenizer, "do_lower_case"):  # only SiglipTokenizer acts on the setting
        return False
    return tokenizer.init_kwargs.get("do_lower_case", True)


def _image_transform(processor: Any) -> PilTransform:
    def prepare(image: Image.Image) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    return PilTransform(prepare)


def _num_tokens(model: torch.nn.Module) -> int:
    text = model.config.text_config
    if model.config.model_type == "clap":
        return min(CLAP_TOKENS, text.max_position_embeddings - 2)  # RoBERTa's positions start at 2
    return text.max_position_embeddings
