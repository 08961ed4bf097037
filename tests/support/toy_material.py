"""Files that random configs name: datasets, subsets, a tokenizer, weights and trained teachers."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from data_prep.shards.index import BLOCK_BYTES, ShardIndex
from data_prep.shards.manifest import read_dataset_files
from data_prep.shards.subset import Subset
from pretrain.config import PretrainConfig
from tests.support.toy_run import COLORS, toy_config, toy_members, write_toy_data, write_toy_dataset
from tests.support.toy_towers import TINY_BERT
from tests.support.toy_views import write_views

CONTEXT_LENGTH = 12  # of teachers, and of the models that they teach
# Of the toy captions, and of the captions with which pretrain.model checks a tower.
WORDS = (
    *("picture", "is", "sound", "of", "hertz", "also", "number", *COLORS, *"0123456789"),
    *("a", "caption", "one", "more"),
)
# The end token has the highest id: open_clip pools there.
VOCABULARY = ("[PAD]", *WORDS, "[UNK]", "[CLS]", "[SEP]")
BERT = TINY_BERT | {"vocab_size": len(VOCABULARY)}
CLIP_TEXT = {"width": 16, "heads": 2, "layers": 2}
CLIP_NAME = "toy_clip"  # in open_clip's registry
CLIP_SIZE = 16  # of its images, and of its joint space
CONVNEXT = {"library": "timm", "name": "test_convnext", "options": {"patch_size": 1}}
DATASETS = {
    "image": ("colors", "more_colors", "photos", "twins", "bad_colors"),
    "audio": ("tones", "bells", "lost_tones"),
    "views": ("clips", "more_clips", "bad_clips"),  # of samples that lack modalities
}
BAD_SAMPLES = (3, 17)  # ordinals in bad_colors and bad_clips
# Texts of the teachers. The captions of the first can be trimmed, those of the others cannot.
TEACHER_TEXTS = {
    "causal": {"library": "open_clip", "options": CLIP_TEXT},
    "whole": {"library": "open_clip", "options": CLIP_TEXT | {"no_causal_mask": True}},
    "last": {"library": "open_clip", "options": CLIP_TEXT | {"pool_type": "last"}},
}


@dataclass(frozen=True)
class ToyMaterial:
    """Paths of everything that `random_configs` draws from."""

    folder: Path

    def dataset(self, name: str) -> Path:
        return self.folder / "data" / name

    def subset(self, name: str) -> Path:
        """Returns the path of a subset with two thirds of a dataset."""
        return self.folder / "data" / f"{name}.subset"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    def weights(self, name: str) -> Path:
        """Returns the weights of CONVNEXT for "image" or "audio", of "clip" (files) or of "bert"
        (a folder)."""
        return self.folder / "weights" / name

    def teacher(self, name: str) -> Path:
        """Returns the run folder of a teacher, whose text tower is that of TEACHER_TEXTS."""
        return self.folder / "teachers" / name

    def teacher_config(self, name: str) -> PretrainConfig:
        """Returns the config of the run that trains a teacher."""
        text = {"tokenizer": str(self.tokenizer), "context_length": CONTEXT_LENGTH}
        return toy_config(
            self.folder / "data",
            self.teacher(name),
            seed=len(name),
            model={"text": text | TEACHER_TEXTS[name]},
            schedule={"num_steps": 1, "warmup_steps": 0},
            run={"folder": self.teacher(name), "trackers": []},
        )


def register_toy_clip(folder: Path) -> None:
    """Makes open_clip know the model CLIP_NAME, in this process."""
    open_clip.add_model_config(folder / "open_clip")


def write_material(folder: Path) -> ToyMaterial:
    """Writes everything except the teachers, which are runs of `teacher_config`."""
    material = ToyMaterial(folder)
    _write_datasets(material)
    write_word_tokenizer(material.tokenizer)
    (folder / "weights").mkdir()
    _write_weights(material)
    (folder / "deepspeed").mkdir()
    for stage in (2, 3):
        # So small that every step takes many buckets.
        tuning = {"reduce_bucket_size": 1000, "allgather_bucket_size": 700, "overlap_comm": True}
        if stage == 3:
            tuning |= {
                "stage3_param_persistence_threshold": 100,
                "stage3_prefetch_bucket_size": 900,
            }
        content = json.dumps({"zero_optimization": tuning})
        (folder / "deepspeed" / f"zero{stage}.json").write_text(content)
    return material


# ------------------------------------------------------------------------------------ datasets


def _write_datasets(material):
    data = write_toy_data(material.folder / "data")
    write_toy_dataset(data / "photos", "image", shard_sizes=(17, 20), members_of=_photo)
    write_toy_dataset(data / "twins", "image", shard_sizes=(30, 11), members_of=_twin("image", 7))
    write_toy_dataset(data / "bells", "audio", shard_sizes=(21,), members_of=_twin("audio", 9))
    write_bad_colors(data)
    write_toy_dataset(data / "lost_tones", "audio", shard_sizes=(20, 16, 4))
    (data / "lost_tones" / "00000002.tar").unlink()
    write_views(data / "clips", fraction=0.75)
    write_views(data / "more_clips", fraction=0.75, seed=1, never=["image"])
    write_views(data / "bad_clips", fraction=0.75, seed=2, always=["scan"])
    _flip_bits(data / "bad_clips" / "00000000", BAD_SAMPLES, field="scan.png")
    for name in (name for names in DATASETS.values() for name in names):
        info, _ = read_dataset_files(data / name)
        kept = np.arange(info.num_samples) * 7 % 11 < 7
        Subset.from_bitmap(info, kept, preparation={}).write(material.subset(name))


def write_bad_colors(data: Path) -> Path:
    """Writes the dataset bad_colors, whose samples BAD_SAMPLES are damaged."""
    # Of its own content, because the shard cache shares equal shards between datasets.
    folder = data / "bad_colors"
    write_toy_dataset(folder, "image", shard_sizes=(40, 23), members_of=_later_color)
    _flip_bits(folder / "00000000", BAD_SAMPLES)
    return folder


def _later_color(number):
    return toy_members("image", 1000 + number)


def _photo(number):
    """A JPEG that is large enough to be decoded at a smaller scale."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (6, 5, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((80, 96), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return {"jpg": buffer.getvalue(), "txt": f"picture {number}".encode()}


def _twin(media, period):
    """Samples with `period` different media and as many different captions, in other pairs."""

    def members_of(number):
        members = toy_members(media, number % period)
        caption = f"{COLORS[number % 4]} number {number % (period - 2)}"
        return {key: value for key, value in members.items() if key != "json"} | {
            "txt": caption.encode()
        }

    return members_of


def _flip_bits(shard, ordinals, *, field="png"):
    index = ShardIndex.read(shard.with_suffix(".idx"))
    content = bytearray(shard.with_suffix(".tar").read_bytes())
    for ordinal in ordinals:
        block = int(index.table[ordinal, index.fields.index(field), 0])
        content[block * BLOCK_BYTES + 20] ^= 1
    shard.with_suffix(".tar").write_bytes(content)


# ------------------------------------------------------------------------ tokenizer and weights


def write_word_tokenizer(folder: Path) -> Path:
    """Writes a transformers tokenizer of VOCABULARY, which splits captions into words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(VOCABULARY)}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    ends = [(word, ids[word]) for word in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    return folder


def _write_weights(material):
    import timm
    from transformers import BertConfig, BertModel

    torch.manual_seed(5)
    for kind, channels in (("image", 3), ("audio", 1)):
        convnext = timm.create_model(
            "test_convnext", num_classes=0, in_chans=channels, **CONVNEXT["options"]
        )
        torch.save(convnext.state_dict(), material.weights(kind))
    BertModel(BertConfig(**BERT)).save_pretrained(material.weights("bert"))
    transformer = {"width": 16, "layers": 1}
    sizes = {
        "embed_dim": CLIP_SIZE,
        "vision_cfg": transformer | {"image_size": CLIP_SIZE, "patch_size": 8, "head_width": 8},
        "text_cfg": transformer
        | {"context_length": CONTEXT_LENGTH, "vocab_size": len(VOCABULARY), "heads": 2},
    }
    registry = material.folder / "open_clip"
    registry.mkdir()
    (registry / f"{CLIP_NAME}.json").write_text(json.dumps(sizes))
    register_toy_clip(material.folder)
    clip = open_clip.create_model(CLIP_NAME, force_custom_text=True)
    torch.save(clip.state_dict(), material.weights("clip"))
