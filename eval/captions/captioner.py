"""Decoders of captions of Isopair's and open_clip's models, behind one interface."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional

from data_prep.errors import InputError
from eval.models.encoder import Encoder
from pretrain.captioning.caption_decoder import CaptionDecoder
from pretrain.captioning.caption_marks import CaptionMarks, find_marks
from pretrain.settings.objectives import ModuleUse
from pretrain.settings.views import View


class Captioner(Protocol):
    """A model that predicts the tokens of captions.

    Attributes:
        views: view that it describes, and view of the texts that it predicts.
        marks: start, end and padding of captions.
        context_length: largest number of tokens of a caption.
        vocab_size: number of tokens that it can predict.
    """

    views: tuple[str, str]
    marks: CaptionMarks
    context_length: int
    vocab_size: int

    def memory(self, *media: Tensor) -> Tensor:
        """Encodes prepared media to what captions attend to: [B, ...] -> [B, Q, W]."""

    def logits(self, memory: Tensor, ids: Tensor) -> Tensor:
        """Returns the logits of the token after each: [B, Q, W], int64 [B, t] -> [B, t, V]."""

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Encodes captions to token ids, int64 [M, context_length]."""

    def text_of(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids without start, end and padding."""


class IsopairCaptioner:
    """A decoder of one of Isopair's models; see `Captioner`.

    Args:
        model: model of a checkpoint.
        decoder: decoder of one of its objectives.
        views: media and text that the decoder reads, without augmentations.
        tokenizer: tokenizer of the model.
    """

    def __init__(
        self, model: Any, decoder: CaptionDecoder, views: tuple[str, str], tokenizer: Any
    ) -> None:
        self.model = model
        self.decoder = decoder
        self.views = views
        self.media, self.text = (View.parse(view).modality for view in views)
        self.tokenizer = tokenizer
        self.marks = decoder.marks
        # A text tower may have positions beyond the longest caption of training.
        self.context_length = min(decoder.decoder.context_length, tokenizer.context_length)
        self.vocab_size = decoder.decoder.text_projection.shape[1]

    def memory(self, *media: Tensor) -> Tensor:
        return self.decoder.memory(self.model.encode_tokens(self.media, *media))

    def logits(self, memory: Tensor, ids: Tensor) -> Tensor:
        padded = _padded(ids, self.context_length, self.marks.pad)
        tokens = self.model.encode_tokens(self.text, padded)[:, : ids.shape[1]]
        return self.decoder.logits(memory, tokens)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        return self.tokenizer(captions)

    def text_of(self, ids: Sequence[int]) -> str:
        return self.tokenizer.text_of(ids)


class OpenClipCaptioner:
    """CoCa of open_clip; see `Captioner`.

    Args:
        model: open_clip's CoCa.
        tokenizer: its tokenizer.
        marks: start, end and padding of captions.
    """

    views = ("image", "text")

    def __init__(self, model: Any, tokenizer: Any, marks: CaptionMarks) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.marks = marks
        self.context_length = model.text_decoder.context_length
        self.vocab_size = model.text_decoder.text_projection.shape[1]

    def memory(self, *media: Tensor) -> Tensor:
        return self.model.visual(*media)[1]

    def logits(self, memory: Tensor, ids: Tensor) -> Tensor:
        padded = _padded(ids, self.context_length, self.marks.pad)
        return self.model.text_decoder(memory, self.model.text(padded)[1][:, : ids.shape[1]])

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        return self.tokenizer(list(captions), context_length=self.context_length)

    def text_of(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids)).strip()


def _padded(ids: Tensor, length: int, pad: int) -> Tensor:
    """Ids padded to the length of captions; a token depends only on those before it"""
    return functional.pad(ids, (0, length - ids.shape[1]), value=pad)


def find_captioner(
    encoder: Encoder, modality: str | None, *, objective: str | None, where: str
) -> Captioner:
    """Finds the decoder of captions of a model.

    Args:
        encoder: encoder of the model.
        modality: modality of the model that is described; None: that of the decoder.
        objective: name of the objective whose decoder is used, or of the decoder if objectives of
            this name have several; None: the only one.
        where: config key of the evaluation, for messages.

    Raises:
        InputError: if the model has no decoder, or several and not one of them is named.
    """
    model, tokenizer = encoder.model, encoder.tokenizer
    if _is_coca_of_open_clip(getattr(model, "model", None)) and modality in (None, "image"):
        marks = find_marks(_TokenizerOfOpenClip(tokenizer), where=where)
        return OpenClipCaptioner(model.model, tokenizer, marks)
    uses = {
        use.module: use
        for use in getattr(model, "module_uses", ())
        if isinstance(model.objective_modules[use.module], CaptionDecoder)
        and modality in (None, View.parse(use.views[0]).modality)
    }
    if not uses:
        of_media = "" if modality is None else f" for {modality}"
        raise InputError(
            f"{where}: the model has no decoder of captions{of_media}; train one with an "
            "objective of kind captioning (docs/training.md), or remove this evaluation"
        )
    use = _chosen(list(uses.values()), objective, modality=modality, where=where)
    decoder = model.objective_modules[use.module]
    return IsopairCaptioner(model, decoder, _plain_views(use), tokenizer)


def _chosen(
    uses: Sequence[ModuleUse], objective: str | None, *, modality: str | None, where: str
) -> ModuleUse:
    """Use of the decoder that an objective's or a decoder's name chooses"""
    matching = [use for use in uses if objective in (None, use.objective, use.module)]
    if len(matching) != 1:
        counts = Counter(use.objective for use in uses)
        names = [use.objective if counts[use.objective] == 1 else use.module for use in uses]
        if modality is None:
            views = [" with ".join(_plain_views(use)) for use in uses]
            names = [f"{name} ({own})" for name, own in zip(names, views, strict=True)]
        raise InputError(
            f"{where}.objective={'null' if objective is None else objective}: expected one of the "
            f"model's objectives that caption {modality or 'media'}: {', '.join(names)}"
        )
    return matching[0]


def _plain_views(use: ModuleUse) -> tuple[str, str]:
    """Media and text of a use, without augmentations"""
    media, text = (View.parse(view) for view in use.views)
    return str(View(media.modality, media.member)), str(View(text.modality, text.member))


def _is_coca_of_open_clip(model: Any) -> bool:
    """Whether a model has a decoder, and a text tower whose tokens see only those before them"""
    is_causal = getattr(getattr(model, "text", None), "attn_mask", None) is not None
    return is_causal and hasattr(model, "text_decoder")


class _TokenizerOfOpenClip:
    """The interface of `find_marks` for open_clip's own tokenizer, whose padding is 0."""

    pad_id = 0

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return self.backend(list(captions))
