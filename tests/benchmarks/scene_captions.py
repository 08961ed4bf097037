"""Captions of the demo's scenes after a short training: exact match against chance.

    make demo    # the data
    python -m tests.benchmarks.scene_captions

A scene has about a hundred right captions: six sentences with synonyms. The test set with all of
them is written next to the demo's, so that a caption matches exactly if it names all five
attributes. The training is that of configs/pretrain/demo_captions.yaml. With `tokenizer`, the
script writes the tokenizer of that config instead.
"""

import itertools
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from data_prep.demo.images import ATTRIBUTES, SCENE_TEMPLATES, scene_combinations

TOKENIZER = Path("configs/pretrain/scene_words")
TABLE = Path("demo/data/scenes/test_all_captions.tsv")
DATASET = "demo/datasets/scenes_all_captions"
SEED = 0  # of configs/data_prep/demo_data.yaml


def captions_of(combination):
    """Returns all sentences about a scene."""
    phrases = [known[value] for known, value in zip(ATTRIBUTES, combination, strict=True)]
    names = ("shape", "colour", "size", "position", "texture")
    sentences = (
        template.format(**dict(zip(names, chosen, strict=True)))
        for template in SCENE_TEMPLATES
        for chosen in itertools.product(*phrases)
    )
    return list(dict.fromkeys(each.replace("a outlined", "an outlined") for each in sentences))


def write_tokenizer():
    """Writes a tokenizer of the words of all scenes; the end has the highest id."""
    every = itertools.product(*ATTRIBUTES)
    words = sorted(
        {
            word
            for combination in every
            for text in captions_of(combination)
            for word, _ in Whitespace().pre_tokenize_str(text)
        }
    )
    marks = ["[PAD]", *words, "[UNK]", "[START]", "[END]"]
    ids = {word: number for number, word in enumerate(marks)}
    backend = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    backend.normalizer = Lowercase()
    backend.pre_tokenizer = Whitespace()
    ends = [(name, ids[name]) for name in ("[START]", "[END]")]
    backend.post_processor = TemplateProcessing("[START] $A [END]", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[START]",
        eos_token="[END]",
    ).save_pretrained(TOKENIZER)


def write_table():
    """Writes the test images with all their captions."""
    _, held_out = scene_combinations(SEED)
    lines = TABLE.with_name("test.tsv").read_text().splitlines()[1:]
    by_caption = {
        caption: captions
        for each in held_out
        for captions in [captions_of(each)]
        for caption in captions
    }
    rows = ["path\tcaption"]
    for line in lines:
        path, caption = line.split("\t")
        rows += [f"{path}\t{each}" for each in by_caption[caption]]
    TABLE.write_text("\n".join(rows) + "\n")


def run(command):
    subprocess.run([sys.executable, "-m", *command], check=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["tokenizer"]:
        write_tokenizer()
        sys.exit()
    write_table()
    prepare = ["data_prep.make_shards", "configs/data_prep/demo_scenes.yaml"]
    run([*prepare, f"input={TABLE}", f"output={DATASET}"])
    run(["pretrain.train", "configs/pretrain/demo_captions.yaml"])
    datasets = [f"evaluations.{name}.dataset={DATASET}" for name in ("greedy", "beams")]
    run(["eval.evaluate", "configs/eval/demo_captions.yaml", *datasets])
