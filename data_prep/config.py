"""Config sections of the commands in this package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_prep.config_file import Location, Section, free
from data_prep.languages import check_language, check_script
from data_prep.modalities.modality import KINDS, NAME, Kind, Modalities, Modality, check_name

MediaKind = Literal["image", "audio"]
CaptionSource = Literal["json", "txt"]
Separator = Annotated[str, Field(pattern=r'^[^"\r\n]$')]  # one character between columns
SourceFormat = Literal[
    "auto",  # detected from the input's name and content
    "csv",
    "tsv",
    "jsonl",
    "parquet",  # paths, URLs or inline bytes; also Hugging Face's image and audio features
    "folder",  # media with a .json or .txt of the same name
    "class_folders",  # one folder of media per class; captions are built from caption_template
    "coco",  # COCO captions: images and annotations in one JSON
    "huggingface",  # folder written by datasets' save_to_disk
    "webdataset",  # tars; or a dataset folder of this package
]
# All filters. The filters in `mark_only` flag a pair instead of dropping it.
FILTER_REASONS = frozenset(
    {
        "audio_silent",
        "audio_too_short",
        "caption_boilerplate",
        "caption_language",
        "caption_repeated",
        "caption_script",
        "caption_too_long",
        "caption_too_short",
        "image_aspect_ratio",
        "image_too_small",
    }
)


class NamedColumn(Section):
    """Column of a modality that has a name of its own."""

    kind: Kind  # image | audio | text | vector
    column: str | tuple[str, ...]  # as in columns.image, columns.text or columns.vector


class Columns(Section):
    """Names of the columns (tables), keys (JSONL) or features (Hugging Face) by role.

    A row is either a pair (`media`, `caption`) or a sample of any modalities (`image` to `named`).
    In folders and tars, the column of a modality is the name of its members: `scan` for
    x.scan.png, `image` for x.png. The column of a text is a key of x.json, or x.title.txt.
    """

    media: str = "path"  # path or URL of the image or clip, or its bytes (Parquet)
    caption: str = "caption"  # text; in JSONL, Parquet and Hugging Face, also a list of texts
    class_name: str | None = None  # label for zero-shot evaluation; null: no labels
    uid: str | None = None  # identifier for people; null: the sample's key
    image: str | None = None  # path or URL of an image, or its bytes
    audio: str | None = None  # path or URL of an audio clip, or its bytes
    text: str | None = None  # text or list of texts
    # numbers: a list column, a path of an .npy file, or several columns of numbers
    vector: str | tuple[str, ...] | None = None
    named: dict[str, NamedColumn] = {}  # further modalities: name -> {kind, column}
    labels: dict[str, str] = {}  # of samples of modalities: label -> column

    @field_validator("named")
    @classmethod
    def _check_names(cls, named: dict[str, NamedColumn]) -> dict[str, NamedColumn]:
        for name, each in named.items():
            if name in KINDS:
                raise ValueError(f"{name}: set columns.{name} instead")
            check_name(name, kind=each.kind)
            if each.kind != "vector" and not isinstance(each.column, str):
                raise ValueError(f"{name}: expected one column for kind {each.kind}")
        return named

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        for name in labels:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r}: expected a name of a-z, 0-9 and _")
        return labels

    def by_modality(self) -> dict[str, NamedColumn]:
        """Returns the column of each modality, in order; {} if a row is a pair."""
        plain = {kind: getattr(self, kind) for kind in KINDS}
        found = {
            kind: NamedColumn(kind=kind, column=column) for kind, column in plain.items() if column
        }
        return found | self.named

    def modalities(self) -> Modalities | None:
        """Returns the modalities of a sample, without shapes; None if a row is a pair."""
        found = {name: Modality(each.kind) for name, each in self.by_modality().items()}
        return Modalities(found) if found else None

    def keys_of_columns(self) -> dict[str, str]:
        """Returns {required column: config key that specifies it}."""
        roles = {role: getattr(self, role) for role in ("class_name", "uid")}
        by_modality = self.by_modality()
        if not by_modality:
            roles = {"media": self.media, "caption": self.caption, **roles}
        keys = {column: f"columns.{role}" for role, column in roles.items() if column}
        for name, each in by_modality.items():
            key = f"columns.{name}" if name in KINDS else f"columns.named.{name}.column"
            columns = (each.column,) if isinstance(each.column, str) else each.column
            keys |= dict.fromkeys(columns, key)
        return keys | {column: f"columns.labels.{name}" for name, column in self.labels.items()}


class ImageOptions(Section):
    """Filters and storage format of images."""

    # if_needed: formats other than jpg, png, webp; a shorter side above shorter_side; an EXIF
    # orientation; colours other than sRGB (ICC, CMYK, 16 bits); alpha
    reencode: Literal["if_needed", "always", "never"] = "if_needed"
    shorter_side: int | None = Field(None, ge=16)  # pixels; larger images are scaled down
    format: Literal["jpg", "png", "webp"] = "jpg"  # format of re-encoded images
    quality: int = Field(95, ge=1, le=100)  # quality of re-encoded jpg and webp images
    # larger images are rejected before they are decoded; stored images have at most 50 million
    max_pixels: int = Field(50_000_000, ge=1, le=150_000_000)
    first_frame: bool = False  # keep the first frame of an animation instead of rejecting it
    min_side: int = Field(1, ge=1)  # filter image_too_small: pixels of the shorter side
    max_aspect_ratio: float | None = Field(None, ge=1)  # filter image_aspect_ratio: long/short side

    @model_validator(mode="after")
    def _check_reencode(self) -> ImageOptions:
        if self.reencode == "never" and (self.shorter_side is not None or self.first_frame):
            raise ValueError(
                "reencode=never keeps every image unchanged; leave shorter_side null and "
                "first_frame false, or set reencode to if_needed"
            )
        return self


class AudioOptions(Section):
    """Filters and storage format of audio clips."""

    # if_needed: only clips whose format, rate, channels or length differ from the settings
    reencode: Literal["if_needed", "always", "never"] = "if_needed"  # to 16-bit FLAC
    sample_rate_hz: int | None = Field(None, ge=1000)  # null: unchanged
    mono: bool = False  # average the channels
    # maximum length of a stored clip; null: no limit
    clip_seconds: float | None = Field(None, gt=0)
    long_clips: Literal["cut", "trim", "reject"] = "cut"  # trim: keep the first part
    trim_silence_dbfs: float | None = Field(None, lt=0)  # trim ends below this level; null: keep
    peak_dbfs: float | None = Field(None, le=0)  # scale the peak to this level; null: unchanged
    max_seconds: float = Field(3600.0, gt=0)  # longer clips are rejected before they are decoded
    max_channels: int = Field(2, ge=1, le=8)  # more are rejected; 8 is FLAC's maximum
    min_seconds: float = Field(0.0, ge=0)  # filter audio_too_short
    min_peak_dbfs: float | None = Field(None, lt=0)  # filter audio_silent

    @model_validator(mode="after")
    def _check_clips(self) -> AudioOptions:
        changes = {
            "sample_rate_hz": self.sample_rate_hz is not None,
            "mono": self.mono,
            "clip_seconds": self.clip_seconds is not None and self.long_clips != "reject",
            "trim_silence_dbfs": self.trim_silence_dbfs is not None,
            "peak_dbfs": self.peak_dbfs is not None,
        }
        if self.clip_seconds is not None and self.min_seconds > self.clip_seconds:
            raise ValueError(
                f"min_seconds={self.min_seconds} is above clip_seconds={self.clip_seconds}: all "
                "cut clips would be too short"
            )
        asked = [name for name, is_asked in changes.items() if is_asked]
        if self.reencode == "never" and asked:
            raise ValueError(
                f"reencode=never keeps every clip unchanged, so that {', '.join(asked)} cannot be "
                "applied; set reencode to if_needed (clip_seconds works with long_clips=reject)"
            )
        return self


class CaptionOptions(Section):
    """Cleaning and filters of captions."""

    unicode: Literal["nfc", "nfkc"] | None = "nfc"  # normal form; null: unchanged
    collapse_spaces: bool = True  # replace whitespace and control characters by single spaces
    strip_html: bool = False  # remove tags; resolve character references such as &amp;
    strip_urls: bool = False  # remove web and email addresses
    fix_encoding: bool = False  # repair wrongly decoded text (ftfy)
    min_characters: int = Field(1, ge=1)  # filter caption_too_short; code points
    max_characters: int | None = Field(None, ge=1)  # filter caption_too_long
    # words: runs of letters and digits; single letters in scripts without spaces, such as Han
    min_words: int = Field(1, ge=1)  # filter caption_too_short
    max_words: int | None = Field(None, ge=1)  # filter caption_too_long
    scripts: tuple[str, ...] = ()  # filter caption_script: Unicode names, such as Latin; (): any
    min_script_fraction: float = Field(0.8, gt=0, le=1)  # of letters in these scripts
    detect_language: bool = False  # fill the column language; implied by `languages`
    languages: tuple[str, ...] = ()  # filter caption_language: codes such as en; (): any
    # a less probable language counts as unknown, and fails the language filter
    min_language_probability: float = Field(0.5, ge=0, le=1)
    boilerplate: tuple[str, ...] = ()  # filter caption_boilerplate: regular expressions
    max_repeats: int | None = Field(None, ge=1)  # filter caption_repeated: max. items per caption

    @field_validator("boilerplate")
    @classmethod
    def _check_expressions(cls, expressions: tuple[str, ...]) -> tuple[str, ...]:
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{expression!r} is not a regular expression: {error}") from None
        return expressions

    @field_validator("scripts")
    @classmethod
    def _check_scripts(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            check_script(name)
        return names

    @field_validator("languages")
    @classmethod
    def _check_languages(cls, codes: tuple[str, ...]) -> tuple[str, ...]:
        for code in codes:
            check_language(code)
        return codes

    @model_validator(mode="after")
    def _check_limits(self) -> CaptionOptions:
        for unit in ("characters", "words"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if most is not None and most < least:
                raise ValueError(
                    f"max_{unit}={most} is below min_{unit}={least}: no caption can pass"
                )
        return self


class DownloadOptions(Section):
    """Downloads of media with http and https URLs."""

    threads: int = free(32, ge=1)  # simultaneous downloads per worker process
    connections_per_host: int = free(4, ge=1)  # total for all worker processes on a machine
    connect_timeout_seconds: float = free(10.0, gt=0)
    read_timeout_seconds: float = free(20.0, gt=0)  # maximum time without receiving data
    total_timeout_seconds: float = free(120.0, gt=0)  # maximum time for one response
    retries: int = free(3, ge=0)  # after timeouts, broken connections, 429 and 5xx
    max_redirects: int = free(5, ge=0)
    user_agent: str = "isopair/0.1 (+https://pypi.org/project/isopair)"
    obey_robots_txt: bool = True
    obey_opt_out_headers: bool = True  # X-Robots-Tag noai, noimageai, ...; TDM-Reservation
    private_hosts: bool = False  # whether to allow URLs on this machine and the local network
    # retry URLs that timed out, were unreachable, or ended in 429 or 5xx in an earlier attempt
    retry_failed: bool = free(False)
    keep: bool = free(False)  # keep downloads after the dataset is finished


class MakeShards(Section):
    """Config of `python -m data_prep.make_shards` and `finalize`: pairs to a dataset of shards."""

    input: Location  # file, folder, glob or URL (s3://, gs://, hf://, https://) of the pairs
    format: SourceFormat = "auto"
    # base folder of relative media paths; null: the input's folder
    media_root: Location | None = None
    output: Path = free()  # dataset folder to create
    media: MediaKind | None = None  # image | audio; null: the rows are samples of modalities
    columns: Columns = Columns()
    keep_columns: tuple[str, ...] = ()  # additional columns to keep: licence, similarity, ...
    # samples of modalities: rows with fewer modalities are rejected
    min_modalities: int = Field(2, ge=1)
    # samples of modalities whose image, clip, text or vector cannot be used: reject the sample, or
    # keep its other modalities and mark it bad_<modality>
    bad_modality: Literal["reject", "absent"] = "reject"
    # folder, webdataset: which caption counts if a sample has one in .json and one in .txt; samples
    # whose two captions differ are tagged caption_differs, and counted
    caption_source: CaptionSource = "json"
    caption_template: str = "{}"  # class_folders: {} is the class name
    # class_folders: whether _ in a folder's name stays, or becomes a space in class and caption
    underscores: Literal["keep", "spaces"] = "keep"
    subset: Path | None = (
        None  # .subset file: read only its samples; the input must be a dataset folder
    )
    # whether fields of tables may be quoted; null: yes in .csv, detected in .tsv
    quotes: bool | None = None
    # one character between the columns of .csv and .tsv; null: detected from the header
    separator: Separator | None = None
    captions_per_item: Literal["group", "row"] = (
        "group"  # group: rows with the same media path form one item; row: each row is an item
    )
    samples_per_shard: int = Field(10_000, ge=1)  # items per shard, before bad pairs are dropped
    max_media_bytes: int = Field(2**28, ge=1, le=2**30)  # larger files are rejected without reading
    image: ImageOptions = ImageOptions()
    audio: AudioOptions = AudioOptions()
    captions: CaptionOptions = CaptionOptions()
    mark_only: tuple[str, ...] = ()  # filters that flag pairs instead of dropping them
    download: DownloadOptions = DownloadOptions()
    part: str | None = free(None, pattern=r"^\d+/[1-9]\d*$")  # i/n, i from 0: one of n jobs
    remake: tuple[str, ...] = free(())  # rewrite shards that have pairs rejected for these reasons
    workers: int = free(1, ge=1)  # number of processes; no effect on the result
    # the job fails above this fraction of bad pairs
    max_rejected_fraction: float = free(0.01, ge=0, le=1)

    @field_validator("mark_only")
    @classmethod
    def _check_filters(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in FILTER_REASONS:
                raise ValueError(
                    f"{name!r} is not a filter; filters: {', '.join(sorted(FILTER_REASONS))}"
                )
        return names

    @model_validator(mode="after")
    def _check_modalities(self) -> Self:
        names = self.columns.by_modality()
        if not names:
            if self.media is None:
                raise ValueError(
                    "expected media=image or media=audio for pairs, or the columns of modalities "
                    "(columns.image, columns.audio, columns.text, columns.vector, columns.named)"
                )
            if self.columns.labels:
                raise ValueError(
                    "columns.labels belongs to samples of modalities: set columns.image or "
                    "columns.audio and columns.text instead of media, or use columns.class_name"
                )
            return self
        defaults = Columns()
        for key, value, default in (
            ("media", self.media, None),
            ("columns.media", self.columns.media, defaults.media),
            ("columns.caption", self.columns.caption, defaults.caption),
        ):
            if value != default:
                raise ValueError(
                    f"{key}={value} belongs to pairs, but columns has the modalities "
                    f"{', '.join(names)}; remove {key}"
                )
        if self.min_modalities > len(names):
            raise ValueError(
                f"min_modalities={self.min_modalities}: expected at most the {len(names)} "
                f"modalities of columns: {', '.join(names)}"
            )
        if self.audio.clip_seconds is not None and self.audio.long_clips == "cut":
            raise ValueError(
                "audio.long_clips=cut makes several samples of one recording, which a sample of "
                "modalities cannot be; set audio.long_clips to trim or reject"
            )
        return self

    @model_validator(mode="after")
    def _check_part(self) -> Self:
        if self.part is not None:
            number, total = map(int, self.part.split("/"))
            if number >= total:
                raise ValueError(
                    f"part={self.part}: expected i/n with i from 0 to n - 1; found i = {number}"
                )
        return self


class VerifyShards(Section):
    """Config of `python -m data_prep.verify_shards`: checks of a dataset against its index."""

    dataset: Path  # folder with dataset.json
    decode: bool = False  # also decode all media and read all captions
    repair: bool = False  # rebuild damaged files where possible
    workers: int = Field(1, ge=1)  # processes


class IndexShards(Section):
    """Config of `python -m data_prep.index_shards`: sidecars for existing tars."""

    input: str  # folder of .tar files, or a glob of them
    output: Path = free()  # folder for the sidecars; may be the folder of the tars
    media: MediaKind | None = None  # image | audio: of pairs; null: `modalities` are set
    # name -> image | audio | text | vector; the members of a sample have these names
    modalities: dict[str, Kind] = {}
    labels: tuple[str, ...] = ()  # keys of `labels` in the .json of samples of modalities
    min_modalities: int = Field(2, ge=1)  # samples with fewer modalities are incomplete
    skip_incomplete: bool = False  # skip samples without media or caption instead of failing
    measure: bool = True  # decode every sample to fill the Parquet file; false: write only indexes
    keep_columns: tuple[str, ...] = ()  # .json keys to copy to the Parquet file
    workers: int = free(1, ge=1)  # processes

    @model_validator(mode="after")
    def _check_modalities(self) -> Self:
        if (self.media is None) == (not self.modalities):
            raise ValueError(
                "expected either media=image or media=audio, for pairs, or modalities, such as "
                "modalities={image: image, scan: image, title: text, values: vector}"
            )
        if self.labels and self.media is not None:
            raise ValueError("labels belong to samples of modalities; remove them")
        for name, kind in self.modalities.items():
            check_name(name, kind=kind)
        if self.modalities and self.min_modalities > len(self.modalities):
            raise ValueError(
                f"min_modalities={self.min_modalities}: expected at most the "
                f"{len(self.modalities)} modalities"
            )
        return self


class NearMedia(Section):
    """Search for near-duplicate images or clips by their fingerprints."""

    # maximum Hamming distance of the 64-bit hashes of whole images; 4 more for crops
    image_max_distance: int = Field(6, ge=0, le=12)
    image_min_similarity: float = Field(0.94, gt=0, le=1)  # minimum similarity of the thumbnails
    # whether mirrored images are duplicates; false if captions tell left from right
    mirrored: bool = True
    # fraction of equal fingerprint bits (chance: 0.5); higher for clips of a few seconds
    audio_min_similarity: float = Field(0.7, gt=0.5, le=1)


class NearCaptions(Section):
    """Search for near-duplicate captions by MinHash over their words (Broder 1997).

    One sample per group of nearly equal captions is kept, even if their media differ.
    """

    min_jaccard: float = Field(0.8, gt=0, le=1)  # minimum Jaccard similarity of the shingle sets
    shingle_words: int = Field(3, ge=1)  # consecutive words per shingle
    permutations: int = Field(128, ge=16)  # hash functions; more raise recall near the threshold


class Semantic(Section):
    """Search for semantic duplicates (SemDeDup, Abbas et al. 2023): cosine of embeddings."""

    embeddings: tuple[Path, ...]  # output folders of python -m eval.embed, one per dataset
    against_embeddings: tuple[Path, ...] = ()  # one per evaluation dataset, in the same order
    min_cosine: float = Field(0.95, gt=0, le=1)
    samples_per_cluster: int = Field(1000, ge=2)  # average number of samples per cluster
    # false: only pairs within a cluster are found, as in the paper; faster for 10 million samples
    across_clusters: bool = True


class FindDuplicates(Section):
    """Config of `python -m data_prep.find_duplicates`: duplicates within and between datasets."""

    datasets: tuple[Path, ...] = Field(min_length=1)  # one sample per group of duplicates is kept
    # evaluation datasets; samples that match one of theirs are dropped
    against: tuple[Path, ...] = ()
    output: Path  # folder for duplicates.parquet, report.html, and a .subset file per dataset
    # of samples of modalities: the image, clip or vector that is compared, and the text of
    # near_captions; null: the only one
    modality: str | None = None
    text: str | None = None
    exact: bool = True  # equal media bytes
    near_media: NearMedia | None = NearMedia()  # null: skip this method
    near_captions: NearCaptions | None = None
    semantic: Semantic | None = None
    keep: Literal["first", "largest"] = "first"  # largest: most pixels or seconds
    seed: int = Field(0, ge=0)  # seed of k-means
    memory_gb: float = free(2.0, gt=0)  # for keys of audio clips; larger data goes to TMPDIR
    workers: int = free(1, ge=1)  # number of threads that compare images


class TopFraction(Section):
    """Selection of the samples with the highest values of a column."""

    column: str
    fraction: float = Field(gt=0, le=1)


class MakeSubset(Section):
    """Config of `python -m data_prep.make_subset`: a selection of samples that copies no data."""

    dataset: Path
    output: Path  # .subset file to write
    where: str | None = None  # SQL condition: "height >= 256 and language = 'en'"
    scores: tuple[str, ...] = ()  # Parquet files with a column uid; their other columns are joined
    embeddings: Path | None = None  # output folder of python -m eval.embed: adds clip_score
    top: TopFraction | None = None  # after `where`
    drop: tuple[Path, ...] = ()  # after `top`: duplicates.parquet files of find_duplicates
    memory_gb: float = free(2.0, gt=0)
    workers: int = free(1, ge=1)  # threads


class Describe(Section):
    """Config of `python -m data_prep.describe`: a data sheet of a dataset, as one HTML file."""

    dataset: Path
    output: Path  # .html file to write
    subset: Path | None = None  # describe only the samples in this .subset file
    duplicates: Path | None = None  # output folder of find_duplicates
    num_samples_shown: int = Field(24, ge=0)  # browsers play at most about 75 sounds per page
    seed: int = Field(0, ge=0)  # selects the samples to show
    memory_gb: float = free(2.0, gt=0)
    workers: int = free(1, ge=1)  # threads

    @field_validator("output")
    @classmethod
    def _check_output(cls, output: Path) -> Path:
        if output.suffix != ".html":
            raise ValueError(f"expected the name of an .html file, found {str(output)!r}")
        return output


class DemoData(Section):
    """Config of `python -m data_prep.make_demo_data`: four small sets."""

    output: Path = Path("demo/data")  # folder to write into
    seed: int = Field(0, ge=0)
    scenes_per_combination: int = Field(9, ge=1)  # training images per kind of scene
    clips_per_sound: int = Field(160, ge=1)  # training clips per kind of sound
    pairs_per_object: int = Field(40, ge=1)  # training images with sounds per object and distance
    workers: int = free(2, ge=1)  # number of processes; no effect on the result
