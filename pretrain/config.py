"""Settings of a pretraining run, one frozen section per concern; YAML mirrors this tree.

Fields marked `free` may differ when a run is resumed: they change speed or bookkeeping, never the
result. All others are part of the run's identity.
"""

from __future__ import annotations

import math
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from data_prep.config_file import STORED, Location, Section, free
from data_prep.modalities.modality import Kind
from pretrain.objective_config import ObjectiveSection
from pretrain.objective_config import validate_section as validate_objective
from pretrain.old_config import OBJECTIVE_KEYS, describe_new_form, has_old_form, in_new_form
from pretrain.preflight_config import Preflight
from pretrain.start_config import Start
from pretrain.views import View, own_features

MediaKind = Literal["image", "audio"]
StreamName = str
Precision = Literal["fp32", "bf16"]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

# At this scale exp(-2 * scale), a term of the softmax, is just above the smallest positive float64.
LARGEST_LOGIT_SCALE = 340.0
# Mean and standard deviation of RGB in [0, 1] for CLIP's image towers (Radford et al. 2021).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# --------------------------------------------------------------------------------------- model


# own: the model's own pooling; last: the last token that is not padding
Pooling = Literal["own", "first", "last", "mean", "max"]


class TowerOutput(Section):
    """Settings that media and text towers share."""

    library: str
    name: str
    # linear: a matrix; mlp: LAION-CLAP's two layers with ReLU; open_clip_mlp: those of open_clip's
    # text towers from transformers; none: the backbone ends in embed_dim numbers. Named open_clip
    # models end in their own projection
    projection: Literal["linear", "mlp", "open_clip_mlp", "none"] = "linear"
    # false: dropout of attention weights, which cannot be drawn per sample, is set to 0
    attention_dropout: bool = True

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

    name: Literal["mlp", "gru"] = "mlp"  # gru: for arrays [time, width], over their rows
    width: PositiveInt = 256  # numbers of a layer; gru: numbers of a state
    num_layers: PositiveInt = 2
    is_bidirectional: bool = False  # gru only: half of a state for each direction

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
        return f"model.modalities.{tower}.tower" if tower in self.modalities else f"model.{tower}"

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
            for key in ("tokenizer", "context_length"):
                own, of_text = getattr(section.tower, key), getattr(self.text, key)
                if own != of_text:
                    raise ValueError(
                        f"modalities.{name}.tower.{key}={own}: all texts are tokenised alike; "
                        f"expected that of model.text, {of_text}"
                    )
        return self

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


# ------------------------------------------------------------------------------------ transforms


class ColorJitter(Section):
    """Colour jitter in training, in this order, as Pillow and torchvision define it.

    Each factor is drawn uniformly from [1 - x, 1 + x], the hue shift from [-x, x] turns.
    """

    probability: Share = 0.8  # fraction of images that are changed
    brightness: Share = 0.32
    contrast: Share = 0.32
    saturation: Share = 0.32
    hue: float = Field(0.08, ge=0, le=0.5)


class ImageTransform(Section):
    """Transform of a decoded image to the tower's square input."""

    size: PositiveInt = 224  # pixels
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


# ---------------------------------------------------------------------------------------- data


StreamNameKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class Source(Section):
    """One dataset of a stream."""

    name: str  # part of every random key: renaming a source changes the order
    # Folder or URL (s3://, gs://, hf://, http://, file://) with dataset.json; its fingerprint is
    # part of the run's identity. A folder is read in place, a URL through loading.cache.
    dataset: Location = free()
    # .subset file: only the samples that it lists are read; its fingerprint is part of the identity
    subset: Location | None = free(None)
    weight: PositiveFloat = 1.0  # fraction of the stream's batch, relative to its other sources


def _refuse_equal_names(sources: list[Source]) -> list[Source]:
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"expected sources with different names, found {names}")
    return sources


Sources = Annotated[list[Source], Field(min_length=1), AfterValidator(_refuse_equal_names)]


class Segment(Section):
    """New sources or weights from a step on; a source that is kept continues at its position."""

    from_step: PositiveInt  # number of steps done before the segment
    sources: Sources


# Validated by the section of the objective's `kind`
AnyObjective = Annotated[SerializeAsAny[ObjectiveSection], BeforeValidator(validate_objective)]
ObjectiveName = Annotated[str, Field(pattern=r"^[a-z0-9_]+(-[a-z0-9_]+)?$")]


class Stream(Section):
    """Samples that are drawn together, and the objectives that read them."""

    global_batch_size: PositiveInt  # samples of a step, contrasted with one another
    # With duplicates=negatives, a new run is refused if this fraction of a step's samples repeats a
    # sample of the same step, because a source is small; 1: never
    max_repeated_fraction: float = Field(0.5, gt=0, le=1)
    weight: PositiveFloat = 1.0  # streams_per_step one: fraction of the steps
    sources: Sources
    segments: list[Segment] = []  # more may be added while a run is stopped; none may change
    # all: only samples that have every modality of the objectives. any: samples that lack one take
    # no part in the objectives that read it
    require: Literal["all", "any"] = "any"
    objectives: dict[ObjectiveName, AnyObjective] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _show_new_form(cls, values: Any) -> Any:
        if isinstance(values, dict) and (old := set(OBJECTIVE_KEYS).intersection(values)):
            raise ValueError(
                f"{', '.join(sorted(old))}: settings of an objective, which stand under "
                "`objectives` now, such as objectives: {image-text: {loss: softmax}}"
            )
        return values

    @property
    def views(self) -> list[str]:
        """Views that the objectives read, each once, in the order in which they are encoded."""
        views = [each.views(name) for name, each in self.objectives.items()]
        return list(
            dict.fromkeys(view for of_one in zip_longest(*views) for view in of_one if view)
        )

    @property
    def requires_all(self) -> bool:
        """Whether samples that lack a modality are left out of the order."""
        return self.require == "all"

    @model_validator(mode="after")
    def _objectives_read_different_views(self) -> Stream:
        for name, objective in self.objectives.items():
            views = objective.views(name)
            for view in views:
                View.parse(view)
            if len(set(views)) < len(views):
                raise ValueError(
                    f"objectives.{name} reads {views[0]!r} twice; set left and right, such as "
                    f"{{left: {views[0]}, right: {{{views[0]}: 2}}}} for two augmentations"
                )
        return self

    @model_validator(mode="after")
    def _segments_in_order(self) -> Stream:
        steps = [segment.from_step for segment in self.segments]
        if steps != sorted(set(steps)):
            raise ValueError(f"expected segments with rising from_step, found {steps}")
        return self

    @model_validator(mode="after")
    def _names_mean_one_dataset(self) -> Stream:
        known: dict[str, tuple[str, str | None]] = {}
        for source in self.all_sources:
            location = (source.dataset, source.subset)
            if known.setdefault(source.name, location) != location:
                raise ValueError(
                    f"source name {source.name!r} is used for both {known[source.name]} and "
                    f"{location}; rename the second one"
                )
        return self

    @property
    def all_sources(self) -> list[Source]:
        """Initial sources and those of every segment; a source may be in several segments."""
        return [*self.sources, *(source for each in self.segments for source in each.sources)]

    @property
    def is_mixed(self) -> bool:
        """Whether some steps mix several sources."""
        return any(len(each.sources) > 1 for each in (self, *self.segments))


class Cache(Section):
    """Cache on each node for shards behind URLs, shared by its processes."""

    folder: Path | None = free(None)  # on a local disk of the node; required for URLs
    max_gigabytes: PositiveFloat | None = free(None)  # null: free disk space when the run starts
    num_downloads: PositiveInt = free(4)  # shards that a node downloads concurrently


class Loading(Section):
    """Reading of samples."""

    removed = {"runtime": "every rank has one loader process, of num_workers threads; delete it"}

    window: PositiveInt = 32768  # samples of a lane that are shuffled together
    # Threads of each rank's loader process; 0: load in the training process
    num_workers: int = free(2, ge=0)
    batches_ahead: PositiveInt = free(2)  # steps loaded in advance; each takes memory
    retries: int = free(5, ge=0)  # retries of a read or download after transient errors
    cache: Cache = free(Cache())
    max_bad_fraction: Share = free(1e-3)  # fraction of unreadable samples above which the run stops
    max_bad_fraction_per_shard: Share = free(1e-2)  # the same for each shard
    # substitute: samples of a missing or damaged shard are replaced by others. All results of the
    # run are then tagged, because they are no longer a function of the config alone.
    on_bad_shard: Literal["stop", "substitute"] = "stop"


# ------------------------------------------------------------------------------------ training


class Optimizer(Section):
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019)."""

    learning_rate: PositiveFloat  # peak
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    weight_decay: float = Field(0.2, ge=0)  # none for norms, biases and logit scales
    gradient_clipping: PositiveFloat | None = 1.0  # largest global gradient norm


class Schedule(Section):
    """Learning rate over steps: linear warm-up, then one of three shapes."""

    num_steps: PositiveInt
    warmup_steps: int = Field(0, ge=0)
    shape: Literal["cosine", "constant", "constant_with_cooldown"] = "cosine"
    cooldown_steps: int = Field(0, ge=0)  # last steps, with the rate decaying linearly to zero

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if (self.shape == "constant_with_cooldown") != (self.cooldown_steps > 0):
            raise ValueError(
                f"shape={self.shape} with cooldown_steps={self.cooldown_steps}; "
                "constant_with_cooldown needs cooldown_steps above 0, other shapes need 0"
            )
        if self.warmup_steps + self.cooldown_steps > self.num_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and cooldown_steps={self.cooldown_steps} "
                f"do not fit into num_steps={self.num_steps}"
            )
        return self


# Fraction of a time-out after which a process without a heartbeat is ended. By then the other
# processes have already failed with the time-out of the process group.
END_FRACTION = 1.5


class Engine(Section):
    """Devices and strategy; except the precision, nothing here changes results beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = free("auto")
    # ddp: each process holds everything (also for a single process). DeepSpeed's ZeRO partitions
    # 0: nothing, 1: the optimizer's state, 2: also gradients, 3: also parameters.
    strategy: Literal["ddp", "zero0", "zero1", "zero2", "zero3"] = free("ddp")
    deepspeed_config: Path | None = free(None)  # a file like those in configs/deepspeed/
    precision: Precision = "bf16"  # bf16: autocast, parameters stay fp32
    # How the loss is divided among processes: strip1 computes least, strip2 communicates least.
    loss_mode: Literal["auto", "strip1", "strip2"] = free("auto")
    # Time-outs of a collective: until the end of an attempt's first step, and afterwards. The
    # stacks of a hanging step are written before the time-out; the process is ended after 1.5 times
    # the time-out. The longer time-out also applies to waiting for a checkpoint.
    start_timeout_seconds: PositiveFloat = free(1800.0)
    timeout_seconds: PositiveFloat = free(600.0)
    activation_checkpointing: bool = free(False)  # trained towers: less memory, a third slower
    compile: bool = free(False)  # torch.compile for towers: compiles for minutes, then runs faster
    # Bitwise equal results in every run on the same number and kind of GPUs: otherwise, some
    # operators sum in varying order. Slower; an operator without a deterministic form raises
    deterministic: bool = free(False)


class Watch(Section):
    """Handling of non-finite and anomalous steps.

    A step whose loss or gradient is not finite is never applied. So nothing here changes a result,
    only whether a run continues.
    """

    # After a non-finite step: stop the run, or skip the step and continue
    on_non_finite: Literal["stop", "skip"] = free("stop")
    max_skipped_steps: PositiveInt = free(3)  # within skip_window_steps; one more stops the run
    skip_window_steps: PositiveInt = free(1000)
    # Values above this factor times their median over window_steps are reported in the metrics
    loss_spike_factor: float = free(2.0, gt=1)
    grad_norm_spike_factor: float = free(5.0, gt=1)
    window_steps: int = free(100, ge=20)
    slow_step_factor: float = free(2.0, gt=1)  # slow: above this factor times the median duration
    # number of consecutive slow steps after which they are reported with the slowest process
    slow_steps: PositiveInt = free(10)


class ValidationSource(Section):
    """Held-out pairs of one stream."""

    dataset: Location = free()  # folder or URL
    subset: Location | None = free(None)
    batch_size: PositiveInt  # pairs contrasted with one another; affects the metrics


class Validation(Section):
    """Loss and in-batch recall on held-out pairs during training."""

    every_steps: PositiveInt = free(1000)
    streams: dict[StreamName, ValidationSource] = {}


class Fork(Section):
    """How a fork starts; it is recorded in the fork's own config."""

    # Step of the parent's checkpoint that the fork starts from; null: the newest valid checkpoint
    step: int | None = Field(None, ge=0)
    # continue: the parent's steps, optimizer state and sample order go on. restart: as in a new run
    # with the parent's weights, steps, warm-up, decay, optimizer state and sample order begin anew
    schedule: Literal["continue", "restart"] = "continue"


# The discriminator limits an error message to the form that was used.
ForkOption = Annotated[
    Annotated[bool, Tag("flag")] | Annotated[Fork, Tag("options")],
    Discriminator(lambda value: "options" if isinstance(value, dict | Fork) else "flag"),
]


class Run(Section):
    """The run folder and its files."""

    folder: Path = free()
    log_every_steps: PositiveInt = free(10)
    checkpoint_every_steps: PositiveInt = free(1000)
    checkpoint_every_minutes: PositiveFloat | None = free(
        None
    )  # additional checkpoints; null: none
    # Folder or URL (s3://, gs://, ...) of the checkpoints; null: checkpoints/ in the run folder
    checkpoint_folder: Location | None = free(None)
    # number of consecutive failed checkpoints at which the run stops
    max_failed_saves: PositiveInt = free(3)
    keep_checkpoints: PositiveInt = free(3)  # number of newest checkpoints; older ones are deleted
    # checkpoints at multiples of this are never deleted; null: all may be
    keep_every_steps: PositiveInt | None = free(None)
    trackers: list[Literal["tensorboard", "wandb"]] = free(["tensorboard"])
    stop_after_step: PositiveInt | None = free(None)  # end this attempt early, with a checkpoint
    # Start a new run from a checkpoint of the run in `folder`, in a folder next to it; true: from
    # the newest one; {step: 4000, schedule: restart}: from another one, or with a new schedule
    fork: ForkOption = free(False)
    # Folder of the run that this one starts from; set by `fork`, or by you to choose `folder`
    parent: Path | None = free(None)

    @property
    def start(self) -> Fork:
        """How the run starts if it is a fork."""
        return self.fork if isinstance(self.fork, Fork) else Fork()

    @property
    def checkpoints(self) -> str:
        """Folder or URL of the checkpoints."""
        return self.checkpoint_folder or str(self.folder / "checkpoints")

    @model_validator(mode="after")
    def _has_one_parent(self) -> Run:
        if self.fork is True and self.parent is not None:
            raise ValueError("fork=true starts from the run in folder; remove fork or parent")
        if self.parent is not None and self.parent.resolve() == self.folder.resolve():
            raise ValueError(f"parent={self.parent} is the run's own folder; use another folder")
        return self

    @model_validator(mode="after")
    def _writes_what_it_keeps(self) -> Run:
        kept, written = self.keep_every_steps, self.checkpoint_every_steps
        if kept is not None and kept % written:
            raise ValueError(
                f"keep_every_steps={kept} is not a multiple of checkpoint_every_steps={written}; "
                f"use {max(1, kept // written) * written}"
            )
        return self


class PretrainConfig(Section):
    """Config of a run."""

    seed: int = Field(0, ge=0, lt=2**63)
    lanes: PositiveInt  # divides every stream's global_batch_size; at most this many processes
    # Pairs of a stream that a process encodes at once; auto: as many as fit into memory.
    micro_batch_size: PositiveInt | Literal["auto"] = free("auto")
    run: Run
    model: Model
    image: ImageTransform = ImageTransform()
    audio: AudioTransform = AudioTransform()
    streams: dict[StreamNameKey, Stream] = Field(min_length=1)
    # all: every step takes all streams; one: every step takes one stream, chosen by weight
    streams_per_step: Literal["all", "one"] = "all"
    loading: Loading = Loading()
    optimizer: Optimizer
    schedule: Schedule
    engine: Engine = Engine()
    watch: Watch = Watch()
    validation: Validation = Validation()
    preflight: Preflight = Preflight()

    @model_validator(mode="before")
    @classmethod
    def _replace_old_form(cls, values: Any, info: ValidationInfo) -> Any:
        if not has_old_form(values):
            return values
        if info.context == STORED:
            return in_new_form(values)
        raise ValueError(
            "`pairings` are `streams` with objectives now; write:\n" + describe_new_form(values)
        )

    @model_validator(mode="after")
    def _batches_divide(self) -> PretrainConfig:
        for name, stream in self.streams.items():
            size, lanes = stream.global_batch_size, self.lanes
            if size % lanes:
                fitting = [n for n in (size // lanes * lanes, -(-size // lanes) * lanes) if n]
                raise ValueError(
                    f"streams.{name}.global_batch_size={size} is not a multiple of lanes={lanes}; "
                    f"use {' or '.join(map(str, fitting))}, or lanes={math.gcd(size, lanes)}"
                )
        return self

    @model_validator(mode="after")
    def _towers_exist(self) -> PretrainConfig:
        kinds, used = self.model.kinds, set()
        for key, objective in self.objectives.items():
            for view in map(View.parse, objective.views(key.partition("/")[2])):
                if view.modality not in kinds:
                    raise ValueError(
                        f"streams.{key.replace('/', '.objectives.')} reads {str(view)!r}: expected "
                        f"a modality of the model ({', '.join(kinds)}); set model."
                        f"{view.modality if view.modality in PLAIN_NAMES else 'modalities'}"
                    )
                used.add(self.model.tower_of(view.modality))
        for tower in self.model.towers:
            if tower not in used:
                raise ValueError(
                    f"model.{tower} is used by no objective: add an objective that reads it, such "
                    f"as {tower}-text, to a stream, or remove it"
                )
        return self

    @model_validator(mode="after")
    def _validation_streams_exist(self) -> PretrainConfig:
        for name in self.validation.streams:
            if name not in self.streams:
                raise ValueError(f"validation.streams.{name}: expected one of {list(self.streams)}")
        return self

    @model_validator(mode="after")
    def _temperatures_agree(self) -> PretrainConfig:
        first: dict[str, tuple[str, bool]] = {}
        for key, objective in self.objectives.items():
            name = objective.temperature_name(key.partition("/")[2])
            if name is None:
                continue
            other, has_bias = first.setdefault(name, (key, objective.has_bias))
            if has_bias != objective.has_bias:
                raise ValueError(
                    f"{other} and {key} share the temperature {name!r}, but only one of them has a "
                    "bias (loss=sigmoid); set `temperature` of one of them to another name"
                )
        return self

    @model_validator(mode="after")
    def _weights_count(self) -> PretrainConfig:
        for name, stream in self.streams.items():
            if self.streams_per_step == "all" and stream.weight != 1:
                raise ValueError(
                    f"streams.{name}.weight={stream.weight:g} with streams_per_step=all: every "
                    "step takes all streams; set the weight of its objectives instead"
                )
        return self

    @property
    def temperatures(self) -> dict[str, bool]:
        """Name of each learned temperature -> whether it has a bias."""
        return {
            name: section.has_bias
            for key, section in self.objectives.items()
            if (name := section.temperature_name(key.partition("/")[2])) is not None
        }

    @property
    def towers_of_temperatures(self) -> dict[str, list[str]]:
        """Names of the towers whose features each learned temperature scales."""
        towers: dict[str, list[str]] = {name: [] for name in self.temperatures}
        for key, section in self.objectives.items():
            objective = key.partition("/")[2]
            if (name := section.temperature_name(objective)) is not None:
                towers[name] += [
                    self.model.tower_of(View.parse(view).modality)
                    for view in section.views(objective)
                ]
        return {name: list(dict.fromkeys(each)) for name, each in towers.items()}

    @property
    def heads(self) -> dict[StreamName, list[tuple[str, str, str]]]:
        """Projections of objectives: (name of the features, of the projection, of its tower).

        Objectives of the same name share them.
        """
        heads: dict[StreamName, list[tuple[str, str, str]]] = {name: [] for name in self.streams}
        for key, section in self.objectives.items():
            stream, _, objective = key.partition("/")
            for view in section.views(objective) if section.projects else ():
                tower = self.model.tower_of(View.parse(view).modality)
                heads[stream].append((own_features(view, objective), f"{objective}:{tower}", tower))
        return heads

    @property
    def objectives(self) -> dict[str, Any]:
        """All objectives, by "<stream>/<objective>"."""
        return {
            f"{name}/{objective}": section
            for name, stream in self.streams.items()
            for objective, section in stream.objectives.items()
        }
