"""Writes the data of the demo: media files with manifests for trying the whole pipeline.

    python -m data_prep.make_demo_data configs/data_prep/demo_data.yaml

    digits/   real scans of handwritten digits (from scikit-learn): zero-shot classification
    scenes/   drawn scenes with held-out combinations of attributes: zero-shot retrieval
    sounds/   synthesised sounds of twelve kinds: zero-shot audio classification
    objects/  drawn objects with the sounds they make: retrieval between images and sounds

Each set has train.tsv, validation.tsv and test.tsv. The same seed produces the same bytes.
"""

from __future__ import annotations

from data_prep.command import check_command_line, run_command, say
from data_prep.config import DemoData

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(DemoData, __doc__)

import sys
from pathlib import Path

import numpy as np

from data_prep.demo.images import (
    DIGIT_NAMES,
    DIGIT_PROMPTS,
    NUM_VALIDATION_SCENES,
    digit_splits,
    scene_caption,
    scene_combinations,
    scene_items,
)
from data_prep.demo.item import write_lines, write_split
from data_prep.demo.objects import DISTANCES, OBJECTS, object_items
from data_prep.demo.sounds import SOUND_PROMPTS, SOUNDS, sound_items
from data_prep.workers import run_tasks

# Training draws one caption per epoch; a model would memorise a single caption with its clip.
NUM_TRAINING_CAPTIONS = 4
NUM_TEST_CLIPS = 25  # per kind of sound
NUM_VALIDATION_CLIPS = 10
NUM_TEST_PAIRS = 10  # per kind of object and distance
NUM_VALIDATION_PAIRS = 2


def make_demo_data(config: DemoData) -> None:
    """Writes the four sets and prints a summary of each.

    Raises:
        InputError: if scikit-learn, which provides the digits, is not installed.
    """
    tasks = [(name, config) for name in WRITERS]
    for sentence in run_tasks(_write_set, tasks, workers=config.workers):
        say(sentence)


def _write_set(task: tuple[str, DemoData]) -> str:
    name, config = task
    return WRITERS[name](config.output / name, config)


def _write_digits(folder: Path, config: DemoData) -> str:
    counts = {
        split: write_split(folder, split, items, header="path caption class_name")
        for split, items in digit_splits(config.seed).items()
    }
    write_lines(folder / "class_names.txt", DIGIT_NAMES)
    write_lines(folder / "prompt_templates.txt", DIGIT_PROMPTS)
    return _summary(folder, counts, "scans of handwritten digits")


def _write_scenes(folder: Path, config: DemoData) -> str:
    known, held_out = scene_combinations(config.seed)
    rng = np.random.default_rng([config.seed, 20])
    chosen = [known[index] for index in rng.permutation(len(known))[:NUM_VALIDATION_SCENES]]
    splits = {
        "train": (known, config.scenes_per_combination, NUM_TRAINING_CAPTIONS),
        "validation": (chosen, 1, 1),
        "test": (held_out, 1, 1),
    }
    counts = {
        split: write_split(
            folder,
            split,
            scene_items(
                combinations, copies=copies, num_captions=num, seed=[config.seed, 21 + number]
            ),
            header="path caption",
        )
        for number, (split, (combinations, copies, num)) in enumerate(splits.items())
    }
    write_lines(folder / "other_captions.txt", [scene_caption(each, rng) for each in known])
    return _summary(
        folder,
        counts,
        f"drawn scenes; the test split shows {len(held_out)} of {len(known) + len(held_out)} "
        "combinations of attributes, which do not occur in training",
    )


def _write_sounds(folder: Path, config: DemoData) -> str:
    splits = {
        "train": (config.clips_per_sound, NUM_TRAINING_CAPTIONS),
        "validation": (NUM_VALIDATION_CLIPS, 1),
        "test": (NUM_TEST_CLIPS, 1),
    }
    counts = {
        split: write_split(
            folder,
            split,
            sound_items(clips_per_sound=clips, num_captions=num, seed=[config.seed, 30 + number]),
            header="path caption class_name",
        )
        for number, (split, (clips, num)) in enumerate(splits.items())
    }
    write_lines(folder / "class_names.txt", SOUNDS)
    write_lines(folder / "prompt_templates.txt", SOUND_PROMPTS)
    return _summary(folder, counts, f"synthesised sounds of {len(SOUNDS)} kinds")


def _write_objects(folder: Path, config: DemoData) -> str:
    copies_of = {
        "train": config.pairs_per_object,
        "validation": NUM_VALIDATION_PAIRS,
        "test": NUM_TEST_PAIRS,
    }
    counts = {
        split: write_split(
            folder,
            split,
            object_items(copies=copies, seed=[config.seed, 40 + number]),
            header="image audio caption class_name",
        )
        for number, (split, copies) in enumerate(copies_of.items())
    }
    return _summary(
        folder, counts, f"drawings of {len(OBJECTS)} objects, near and far, with their sounds"
    )


# The slowest set is first, so that two processes finish at about the same time.
WRITERS = {
    "sounds": _write_sounds,
    "objects": _write_objects,
    "scenes": _write_scenes,
    "digits": _write_digits,
}


def _summary(folder: Path, counts: dict[str, int], what: str) -> str:
    numbers = ", ".join(f"{count:,} for {split}" for split, count in counts.items())
    return f"{folder}: {numbers}: {what}"


def print_plan(config: DemoData) -> None:
    """Prints the sizes of the sets to be written."""
    known, held_out = scene_combinations(config.seed)
    num_scenes = len(known) * config.scenes_per_combination
    num_clips = len(SOUNDS) * config.clips_per_sound
    num_pairs = len(OBJECTS) * len(DISTANCES) * config.pairs_per_object
    say(
        f"would write into {config.output}: digits (1,797 images), scenes ({num_scenes:,} for "
        f"training, {len(held_out)} held-out combinations), sounds ({num_clips:,} clips for "
        f"training), objects ({num_pairs:,} images with sounds for training)"
    )


def main() -> int:
    """Runs the command."""
    return run_command(DemoData, run=make_demo_data, dry_run=print_plan, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
