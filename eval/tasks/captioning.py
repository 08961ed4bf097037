"""Captions that a model writes for media, compared with references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from data_prep.errors import InputError
from eval.captions.cider import caption_words, cider_d
from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.datasets.labels import named_modalities, read_texts, texts_of
from eval.datasets.views import modalities_of, samples_having
from eval.embeddings.items import MediaSet, read_items
from eval.tasks.task import CaptionedSection, Outcome, Task
from pretrain.settings.views import View

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.report import html
    from eval.captions.captioner import Captioner
    from eval.captions.written import WrittenCaption
    from eval.metrics.intervals import Bootstrap, Score
    from eval.models.encoder import Encoder
    from eval.report.differences import Difference, ResultPair
    from eval.tasks.runner import Embeddings


class CaptioningSection(CaptionedSection):
    """Writes a caption of each media item; for models with a decoder, such as CoCa.

    Samples carry references in .json or .txt. Of shards with named modalities, the views are those
    of the model's objective.
    """

    task: Literal["captioning"]
    num_beams: PositiveInt = 1  # captions that beam search continues; 1: greedy search
    max_tokens: PositiveInt | None = None  # with start and end; null: the model's context length
    length_penalty: float = Field(1.0, ge=0)  # log probabilities are divided by length to its power
    caption_batch_size: PositiveInt = 16  # items captioned at once
    # Objective of the model whose decoder is used, or the decoder, such as captions:image-text, if
    # objectives of this name have several; null: the only one, for media with captions the only one
    # for this kind of media
    objective: str | None = None

    def views_of(self, dataset: EvaluationSet) -> list[str]:
        """Returns the media and the captions; of named modalities none, as the model decides."""
        return super().views_of(dataset) if named_modalities(dataset) is None else []


@dataclass(frozen=True)
class CaptioningResult:
    """Captions with their metrics."""

    scores: dict[str, Score]
    captions: list[WrittenCaption]  # [Q]
    exact_matches: np.ndarray  # [Q] 0 or 1
    cider: np.ndarray  # [Q]


@dataclass(frozen=True)
class CaptioningTask(Task, section=CaptioningSection):
    """Captions of media items, compared with references."""

    references: list[list[str]]  # [Q] captions of each item; []: of views that a model decides
    section: CaptioningSection

    dataset_types = ("retrieval",)
    main_metrics = ("exact_match",)
    measures_embeddings = False
    conditions = ("references_sha256", "num_beams", "max_tokens", "length_penalty")

    @classmethod
    def read(
        cls,
        name: str,
        section: CaptioningSection,
        dataset: EvaluationSet,
        *,
        sets: EvaluationSets,
        seed: int,
    ) -> CaptioningTask:
        if named_modalities(dataset) is not None:
            return cls(name, dataset, [], [], section)
        samples = [(sample.key, texts_of(sample, dataset)) for sample in read_texts(dataset)]
        keys, references = [key for key, _ in samples], [texts for _, texts in samples]
        return cls(name, dataset, keys, references, section)

    def description(self) -> str:
        if self.references:
            return super().description()
        return (
            f"{self.name}: {self.method()}, {len(self.dataset)} samples, the views of the model's "
            f"objective ({self.dataset.folder})"
        )

    def method(self) -> str:
        beams = self.section.num_beams
        return f"captions by {'greedy search' if beams == 1 else f'search with {beams} beams'}"

    def details(self) -> str:
        return f"{sum(map(len, self.references))} references"

    @property
    def view(self) -> str:
        """View that is described."""
        return self.media_sets[0].views[0]

    @cached_property
    def reference_words(self) -> list[list[list[str]]]:
        """[Q] words of the references of each item."""
        return [[caption_words(text) for text in own] for own in self.references]

    def captioner(self, encoder: Encoder) -> Captioner:
        """Returns the decoder of a model.

        Raises:
            InputError: if the model has none, or captions may not be as long as `max_tokens`.
        """
        from eval.captions.captioner import find_captioner

        where = f"evaluations.{self.name}"
        is_named = named_modalities(self.dataset) is not None
        modality = None if is_named else View.parse(self.view).modality
        found = find_captioner(encoder, modality, objective=self.section.objective, where=where)
        if (self.section.max_tokens or 0) > found.context_length:
            raise InputError(
                f"{where}.max_tokens={self.section.max_tokens}: expected at most the model's "
                f"context length, {found.context_length}"
            )
        return found

    def for_model(self, encoder: Encoder) -> CaptioningTask:
        """Returns the task with the views of the model's decoder; see the base class."""
        found = self.captioner(encoder)
        if named_modalities(self.dataset) is None:
            return self
        try:
            return self._with_views(encoder, found.views)
        except InputError as error:
            media, text = found.views
            raise InputError(
                f"evaluations.{self.name}: the decoder describes {media}, and its captions are "
                f"compared with {text}: {error}"
            ) from None

    def _with_views(self, encoder: Encoder, views: tuple[str, str]) -> CaptioningTask:
        from eval.models.encoder import check_view

        having = samples_having(self.dataset, views)
        for view in views:
            modality = modalities_of(having)[View.parse(view).member]
            check_view(encoder, view, modality, folder=having.folder)
        keys = [sample.key for sample in read_texts(having)]
        items = read_items(having, keys, views[1])
        texts = [[items.texts[n] for n in items.items_of(sample)] for sample in range(len(keys))]
        return replace(
            self,
            dataset=having,
            keys=keys,
            references=texts,
            items=MediaSet(having, keys, views[0]),
            needed_views=views,
            num_lacking=len(self.dataset) - len(having),
        )

    def compute(self, encoder: Encoder) -> tuple[list[WrittenCaption], int]:
        """Writes the captions; returns them with the size of the vocabulary."""
        from eval.captions.written import SearchSettings, write_captions

        captioner = self.captioner(encoder)
        settings = SearchSettings(
            self.section.num_beams,
            self.section.max_tokens or captioner.context_length,
            self.section.length_penalty,
            self.section.caption_batch_size,
        )
        captions = write_captions(
            captioner,
            encoder,
            self.dataset,
            self.references,
            keys=self.keys,
            view=self.view,
            settings=settings,
        )
        return captions, captioner.vocab_size

    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[CaptioningResult, Tensor]:
        """Returns the result, and no embeddings that media are compared with."""
        captions, vocab_size = embeddings.computed[self.name]
        words = [caption_words(each.caption) for each in captions]
        hits = np.array(
            [float(own in right) for own, right in zip(words, self.reference_words, strict=True)]
        )
        cider = cider_d(words, self.reference_words)
        scores = self._scores(captions, hits, cider, vocab_size=vocab_size, seed=bootstrap.seed)
        return CaptioningResult(scores, captions, hits, cider), media

    def _scores(
        self,
        captions: Sequence[WrittenCaption],
        hits: np.ndarray,
        cider: np.ndarray,
        *,
        vocab_size: int,
        seed: int,
    ) -> dict[str, Score]:
        from eval.metrics.intervals import mean_score, score_without_interval

        num_tokens = sum(each.num_tokens for each in captions)
        values = {
            "cider": (cider.mean(), self._chance_of_cider(seed), len(cider), "of CIDEr"),
            "token_accuracy": (
                sum(each.num_best for each in captions) / num_tokens,
                1 / vocab_size,
                num_tokens,
                "of tokens",
            ),
            "token_loss": (
                sum(each.loss for each in captions) / num_tokens,
                np.log(vocab_size),
                num_tokens,
                "of tokens",
            ),
        }
        return {
            "exact_match": mean_score(hits, chance=self._chance_of_match(), are_hits=True),
            **{
                name: score_without_interval(value, chance, number, reason=reason)
                for name, (value, chance, number, reason) in values.items()
            },
        }

    def _chance_of_match(self) -> float:
        """Expected exact match of a reference of a random item"""
        counts: Counter[tuple[str, ...]] = Counter()
        for own in self.reference_words:
            for words in own:
                counts[tuple(words)] += 1 / len(own)
        return float(
            np.mean(
                [sum(counts[each] for each in set(map(tuple, own))) for own in self.reference_words]
            )
            / len(self.reference_words)
        )

    def _chance_of_cider(self, seed: int) -> float:
        """CIDEr-D if every item gets the first reference of another, drawn once"""
        order = np.random.default_rng(seed).permutation(len(self.reference_words))
        shifted = np.empty_like(order)
        shifted[order] = np.roll(order, 1)
        others = [self.reference_words[other][0] for other in shifted]
        return float(cider_d(others, self.reference_words).mean())

    def record(self, outcome: Outcome) -> dict[str, Any]:
        from eval.embeddings.store import checksum_of_texts

        return {
            **({} if self.items is None else {"text": self.needed_views[1]}),
            "num_queries": len(self.references),
            "num_references": sum(map(len, self.references)),
            "references_sha256": checksum_of_texts(chain.from_iterable(self.references)),
            "num_beams": self.section.num_beams,
            "max_tokens": self.section.max_tokens,
            "length_penalty": self.section.length_penalty,
            "cider": "CIDEr-D from 0 to 10, of words in lower case without punctuation",
            "token_loss": "mean cross-entropy of the tokens of all references, in nats",
        }

    def predictions(self, outcome: Outcome) -> dict[str, Mapping[str, Any]]:
        result, captions = outcome.result, outcome.result.captions
        return {
            "": {
                "key": self.keys,
                "references": self.references,
                "written": [each.caption for each in captions],
                "exact_match": result.exact_matches,
                "cider": result.cider,
                "loss": [each.loss for each in captions],
                "num_tokens": [each.num_tokens for each in captions],
            }
        }

    @classmethod
    def differences(cls, pair: ResultPair) -> Iterator[Difference]:
        yield from pair.mean_differences({"exact_match": "exact_match"})

    def report_section(self, outcome: Outcome, *, num_queries: int) -> html.Section:
        """Shows items with the caption that was written and their references, worst first."""
        from data_prep.report import html
        from eval.report.gallery import ItemViews, card, cards, shown_queries

        views, result = ItemViews(self.media_sets[0]), outcome.result
        blocks = []
        for item in shown_queries(-result.cider, num_queries=num_queries):
            kind = "good" if result.exact_matches[item] else "missed"
            label = f"{result.captions[item].caption} ({' / '.join(self.references[item][:2])})"
            blocks.append(card(views.of(item), label, kind=kind))
        note = [f"{self.description()}. References in parentheses.", *self.notes(outcome)]
        return html.Section(self.name, [cards(blocks)], note=" ".join(note))
