"""Config section `model`: towers by modality, and the joint space."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from data_prep.config_file import Section
from data_prep.modalities.modality import KINDS, Kind
from pretrain.settings.warm_start import Start

MediaKind = Literal["image", "audio"]
# At this scale exp(-2 * scale), a term of the softmax, is just above the smallest positive float64.
LARGEST_LOGIT_SCALE = 340.0


# own: the model's own pooling; last: the last token that is not padding
Pooling = Literal["own", "first", "last", "mean", "max"]


class TowerOutput(Section):
    """Settings that media and text towers share."""

    library: str
    name: str
    frozen: bool
    # linear: a matrix; mlp: LAION-CLAP's two layers with ReLU; open_clip_mlp: those of open_clip's
    # text towers from transformers; none: the backbone ends in embed_dim numbers. Named open_clip
    # models end in their own projection
    projection: Literal["linear", "mlp", "open_clip_mlp", "none"] = "linear"
    # false: dropout of attention weights, which cannot be drawn per sample, is set to 0
    attention_dropout: bool = True
    # learning rate of the tower and its projections, relative to optimizer.learning_rate
    learning_rate_scale: PositiveFloat = 1.0
    # Learning rate of a block, relative to that of the next one, as in BEiT and timm; that of the
    # last block relative to what follows it (norm, projections); that of the embeddings relative
    # to the first block. null: all have the tower's rate
    layer_decay: float | None = Field(None, gt=0, le=1)
    # The first n blocks are frozen, with the embeddings before them; 0: the embeddings alone; -n:
    # all but the last n blocks; null: none
    frozen_blocks: int | None = None

    @model_validator(mode="after")
    def _trains_its_blocks(self) -> TowerOutput:
        for name in ("layer_decay", "frozen_blocks"):
            if getattr(self, name) is not None and self.frozen:
                raise ValueError(
                    f"{name}={getattr(self, name)} with frozen=true, which freezes the backbone; "
                    "remove one of them"
                )
        return self

    @model_validator(mode="after")
    def _has_one_projection(self) -> TowerOutput:
        is_named = self.library == "open_clip" and self.name != "TextTransformer"
        if is_named and self.projection != "linear":
            raise ValueError(
                f"projection={self.projection} with the open_clip model {self.name}, which ends "
                "in its own projection; remove it"
            )
        return self


class MediaTower(TowerOutput):
    """An encoder of images or log-mel spectrograms; its output is projected to embed_dim."""

    library: Literal["timm", "open_clip", "transformers"]
    # timm model, open_clip model (its image tower is used), or transformers model or folder
    name: str
    # weights: true, an open_clip tag, or a file; false: trained from scratch. The fingerprint of
    # the files is part of the identity, here and in TextTower
    pretrained: bool | str = False
    start: Start | None = None  # weights at step 0, of any library's files, or of a run
    frozen: bool = False  # keep the loaded weights; the projection is still trained
    options: dict[str, Any] = {}  # further arguments of the library's constructor or config
    # transformers only; null: the model's own, or the mean over tokens if it has none
    pooling: Pooling | None = None
    # frozen: batch norm keeps its loaded or measured statistics, and its weights are trained;
    # null: refused, because a process's own statistics change with the number of processes
    batch_norm: Literal["frozen"] | None = None
    # Number of the run's first samples that statistics are measured on, if no weights are loaded
    batch_norm_samples: PositiveInt = 256

    @model_validator(mode="after")
    def _pools_tokens(self) -> MediaTower:
        if self.pooling is not None and self.library != "transformers":
            raise ValueError(
                f"pooling={self.pooling} with library={self.library}: it is for transformers "
                "alone; remove it (timm: options: {global_pool: avg} or another of its names)"
            )
        return self


class TextTower(TowerOutput):
    """The encoder of captions and its tokenizer."""

    # torch: small towers for small data
    library: Literal["open_clip", "transformers", "torch"]
    # "TextTransformer" (sized by options), open_clip or HF model; torch: "word_vectors" (a file in
    # text format as `pretrained`) or "gru" (options: width, num_layers, is_bidirectional)
    name: str = "TextTransformer"
    pretrained: bool | str = False
    start: Start | None = None
    frozen: bool = False
    options: dict[str, Any] = {}
    context_length: PositiveInt = 77  # tokens; captions are truncated or padded to it
    # transformers tokenizer (name or folder; its fingerprint is part of the identity); null: that
    # of `name`, or open_clip's BPE; word_vectors: the words of the file
    tokenizer: str | None = None
    pooling: Pooling = "mean"  # over tokens; not for open_clip's towers

    @property
    def own_tokenizer(self) -> str | None:
        """What names the tokenizer if `tokenizer` does not; None if it does."""
        if self.tokenizer is not None:
            return None
        if self.library == "torch" and self.pretrained:
            return f"words of {self.pretrained}"
        return "CLIP's" if self.library == "open_clip" else f"that of {self.name}"

    # Cleaning of captions before the tokenizer. whitespace: repaired encodings and single spaces;
    # lower: also lower case; canonicalize: also without punctuation (SigLIP). null: that of the
    # named open_clip model with a tokenizer of transformers, otherwise none
    cleaning: Literal["none", "whitespace", "lower", "canonicalize"] | None = None


class VectorTower(Section):
    """The encoder of a modality of kind `vector`."""

    # settings of other towers that these do not have
    library: ClassVar[str] = "torch"
    projection: ClassVar[str] = "linear"
    frozen: ClassVar[bool] = False
    start: ClassVar[None] = None
    layer_decay: ClassVar[None] = None
    frozen_blocks: ClassVar[None] = None

    name: Literal["mlp", "gru"] = "mlp"  # gru: for arrays [time, width], over their rows
    width: PositiveInt = 256  # numbers of a layer; gru: numbers of a state
    num_layers: PositiveInt = 2
    is_bidirectional: bool = False  # gru only: half of a state for each direction
    learning_rate_scale: PositiveFloat = 1.0  # relative to optimizer.learning_rate

    @model_validator(mode="after")
    def _has_directions(self) -> VectorTower:
        if self.is_bidirectional and (self.name == "mlp" or self.width % 2):
            raise ValueError(
                f"is_bidirectional with name={self.name} and width={self.width}: it is for gru "
                "with an even width"
            )
        return self


class LogitScale(Section):
    """The learned inverse temperature, one per name, stored as its logarithm."""

    initial: PositiveFloat = 1 / 0.07
    # clamped to [1, maximum] in the optimizer step
    maximum: float = Field(100.0, gt=0, le=LARGEST_LOGIT_SCALE)

    @model_validator(mode="after")
    def _starts_within_bounds(self) -> LogitScale:
        if not 1 <= self.initial <= self.maximum:
            raise ValueError(
                f"expected 1 <= initial <= maximum, found {self.initial:g} and {self.maximum:g}"
            )
        return self


def _own_or_shared(value: Any) -> str:
    return "shared" if isinstance(value, str) else "own"


class ImageModality(Section):
    """Further images of a sample, such as a second photograph; transformed as `image` is."""

    kind: Literal["image"]
    # A tower of its own, or the name of another modality of this kind that has one
    tower: Annotated[
        Annotated[str, Tag("shared")] | Annotated[MediaTower, Tag("own")],
        Discriminator(_own_or_shared),
    ]


class AudioModality(Section):
    """Further sounds of a sample; transformed as `audio` is."""

    kind: Literal["audio"]
    tower: Annotated[
        Annotated[str, Tag("shared")] | Annotated[MediaTower, Tag("own")],
        Discriminator(_own_or_shared),
    ]


class TextModality(Section):
    """Further texts of a sample, such as a title; tokenised as `text` is."""

    kind: Literal["text"]
    tower: Annotated[
        Annotated[str, Tag("shared")] | Annotated[TextTower, Tag("own")],
        Discriminator(_own_or_shared),
    ]


class VectorModality(Section):
    """Numbers of fixed width: features made by hand or by another model, readings of sensors.

    They are standardised by the statistics of the datasets that a run starts with.
    """

    kind: Literal["vector"]
    width: PositiveInt  # columns; the same in every dataset
    # [time, width] with any length, cut after this many rows; null: [width]
    max_rows: PositiveInt | None = None
    # without a name, an mlp for [width] and a gru for [time, width]
    tower: Annotated[
        Annotated[str, Tag("shared")] | Annotated[VectorTower, Tag("own")],
        Discriminator(_own_or_shared),
    ]

    @model_validator(mode="before")
    @classmethod
    def _choose_the_tower(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        tower = values.get("tower", {})
        if isinstance(tower, dict):
            name = "mlp" if values.get("max_rows") is None else "gru"
            values = values | {"tower": {"name": name} | tower}
        return values

    @model_validator(mode="after")
    def _fits_the_tower(self) -> VectorModality:
        wanted = "mlp" if self.max_rows is None else "gru"
        if isinstance(self.tower, VectorTower) and self.tower.name != wanted:
            raise ValueError(
                f"tower.name={self.tower.name} with max_rows="
                f"{'null' if self.max_rows is None else self.max_rows}: expected {wanted}; mlp is "
                "for vectors [width], gru for [time, width]"
            )
        return self


def _as_modality(value: Any) -> Any:
    """`scan: image` means a modality of kind image that shares the tower of `image`."""
    kind = _kind_of(value) if isinstance(value, dict | Section) else value
    if kind not in KINDS:
        raise ValueError(
            f"expected a kind ({', '.join(KINDS)}), found {kind!r}; to share the tower of another "
            "modality, write {kind: ..., tower: its name}"
        )
    return {"kind": value, "tower": value} if isinstance(value, str) else value


def _kind_of(value: Any) -> Any:
    return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)


ModalitySection = Annotated[
    Annotated[
        Annotated[ImageModality, Tag("image")]
        | Annotated[AudioModality, Tag("audio")]
        | Annotated[TextModality, Tag("text")]
        | Annotated[VectorModality, Tag("vector")],
        Discriminator(_kind_of),
    ],
    BeforeValidator(_as_modality),
]
ModalityName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
PLAIN_NAMES = ("image", "audio", "text")


def tower_key(tower: str) -> str:
    """Returns the config key of a tower, by the name of the modality that it is declared for."""
    return f"model.{tower}" if tower in PLAIN_NAMES else f"model.modalities.{tower}.tower"


TowerSection = MediaTower | TextTower | VectorTower


class Model(Section):
    """Towers by modality, one joint space."""

    embed_dim: PositiveInt  # joint embedding width D
    image: MediaTower | None = None
    audio: MediaTower | None = None
    text: TextTower | None = None
    # Further modalities; `scan: image` is one of kind image that shares the tower of `image`
    modalities: dict[ModalityName, ModalitySection] = {}
    logit_scale: LogitScale = LogitScale()
    initial_logit_bias: float = -10.0  # learned, one per temperature of the sigmoid loss

    @property
    def kinds(self) -> dict[str, Kind]:
        """Kind of each modality."""
        plain: dict[str, Any] = {
            name: name for name in PLAIN_NAMES if getattr(self, name) is not None
        }
        return plain | {name: each.kind for name, each in self.modalities.items()}

    @property
    def towers(self) -> dict[str, TowerSection]:
        """Section of each tower, by the name of the modality that it is declared for."""
        plain = {name: getattr(self, name) for name in PLAIN_NAMES}
        own = {
            name: each.tower
            for name, each in self.modalities.items()
            if not isinstance(each.tower, str)
        }
        return {name: each for name, each in plain.items() if each is not None} | own

    def tower_of(self, modality: str) -> str:
        """Returns the name of a modality's tower."""
        section = self.modalities.get(modality)
        shared = section is not None and isinstance(section.tower, str)
        return section.tower if shared else modality

    def tower_key(self, tower: str) -> str:
        """Returns the config key of a tower."""
        return tower_key(tower)

    @model_validator(mode="after")
    def _names_are_free(self) -> Model:
        for name, section in self.modalities.items():
            if name in (*PLAIN_NAMES, "vector") and name != section.kind:
                raise ValueError(
                    f"modalities.{name}: the name of kind {name} for a modality of kind "
                    f"{section.kind}; choose another"
                )
            if name in PLAIN_NAMES:
                raise ValueError(f"modalities.{name}: write it as model.{name}")
        return self

    @model_validator(mode="after")
    def _shared_towers_fit(self) -> Model:
        kinds, towers = self.kinds, self.towers
        for name, section in self.modalities.items():
            if section.kind == "text" and self.text is None:
                raise ValueError(f"modalities.{name}: texts are tokenised as model.text is; set it")
            if not isinstance(section.tower, str):
                continue
            fitting = [each for each in towers if kinds[each] == section.kind]
            if section.tower not in fitting:
                raise ValueError(
                    f"modalities.{name}.tower={section.tower}: expected a tower of its own, or the "
                    f"name of a modality of kind {section.kind} that has one "
                    f"({', '.join(fitting) or 'there is none'})"
                )
            other = self.modalities.get(section.tower)
            if isinstance(section, VectorModality) and (section.width, section.max_rows) != (
                other.width,
                other.max_rows,
            ):
                raise ValueError(
                    f"modalities.{name} shares the tower of {section.tower}: expected the same "
                    "width and max_rows"
                )
        return self

    @model_validator(mode="after")
    def _texts_have_one_tokenizer(self) -> Model:
        for name, section in self.modalities.items():
            if not isinstance(section, TextModality) or isinstance(section.tower, str):
                continue
            for key in ("tokenizer", "context_length", "cleaning"):
                own, of_text = getattr(section.tower, key), getattr(self.text, key)
                if own != of_text:
                    raise ValueError(
                        f"modalities.{name}.tower.{key}={own}: all texts are tokenised alike; "
                        f"expected that of model.text, {of_text}"
                    )
            if section.tower.own_tokenizer != self.text.own_tokenizer:
                raise ValueError(
                    f"modalities.{name}.tower: its tokenizer ({section.tower.own_tokenizer}) is "
                    f"not that of model.text ({self.text.own_tokenizer}); set `tokenizer` of both"
                )
        return self

    @model_validator(mode="after")
    def _starts_from_one_source(self) -> Model:
        for name, tower in self.towers.items():
            if tower.start is not None and tower.pretrained:
                raise ValueError(
                    f"{name}: start and pretrained={tower.pretrained!r} both name weights; remove "
                    "pretrained"
                )
        return self
