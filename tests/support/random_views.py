"""Random streams of samples with any modalities, for `random_configs`.

The objectives are drawn first; the model then has the modalities that they read.
"""

from tests.support.random_towers import draw_rates
from tests.support.toy_material import BERT, CLIP_TEXT, CONVNEXT

# Objective -> views that it reads
PAIRS = {
    "image-text": ("image", "text"),
    "audio-text": ("audio", "text"),
    "image-audio": ("image", "audio"),
    "image-scan": ("image", "scan"),
    "title-text": ("title", "text"),
    "values-text": ("values", "text"),
    "values-image": ("values", "image"),
    "series-text": ("series", "text"),
    "series-audio": ("series", "audio"),
}
# Further views of `image` and `text`, whose towers another objective trains as well.
AUGMENTED = {"left": "image", "right": {"image": 2}, "projection": "own"}
NAMED_TEXTS = {"left": {"text": "title"}, "right": "text"}


def draw_view_objectives(rng, draw_objective):
    """Draws objectives, and whether their samples must have every modality.

    Args:
        draw_objective: function that draws the settings of an objective without views.

    Returns:
        ({name: settings}, require)
    """
    requires_all = rng.random() < 0.25
    # Few samples have every modality of many objectives.
    names = rng.sample(sorted(PAIRS), 1 if requires_all else rng.randint(1, 4))
    objectives = {name: draw_objective() for name in names}
    for name in names:
        if rng.random() < 0.3:
            objectives[name]["temperature"] = rng.choice((None, "shared"))
    read = modalities_of(objectives)
    if "image" in read and rng.random() < 0.5:
        objectives["augmented"] = AUGMENTED | draw_objective()
    if "text" in read and rng.random() < 0.3:
        objectives["texts"] = NAMED_TEXTS | draw_objective()
    return objectives, "all" if requires_all else "any"


def agree_on_temperatures(streams):
    """Gives objectives whose temperature already has another loss one of their own."""
    kinds = {}
    for stream in streams.values():
        for name, values in stream["objectives"].items():
            temperature = values.get("temperature") or name
            if kinds.setdefault(temperature, values["loss"]) != values["loss"]:
                values["temperature"] = f"{name}_{values['loss']}"


def modalities_of(objectives):
    """Returns the modalities that objectives read."""
    return {each for name in objectives for each in PAIRS.get(name, ())}


def draw_modalities(rng, read, text):
    """Draws the section `model.modalities`, of the modalities that objectives read.

    Args:
        read: names of modalities.
        text: section `model.text`; None without a text tower.
    """
    own_image = CONVNEXT | _draw_training(rng)
    # Cut after max_rows: series have up to six.
    series = {"kind": "vector", "width": 2, "max_rows": rng.choice((4, 6))}
    bidirectional = rng.random() < 0.5
    drawn = {
        "scan": {"kind": "image", "tower": rng.choice(("image", own_image, own_image))},
        "title": {"kind": "text", "tower": _draw_title_tower(rng, text)},
        "values": {"kind": "vector", "width": 3, "tower": _draw_vector_tower(rng)},
        "series": series | {"tower": _draw_vector_tower(rng) | {"is_bidirectional": bidirectional}},
    }
    return {name: section for name, section in drawn.items() if name in read}


def _draw_vector_tower(rng):
    return {
        "width": rng.choice((8, 12)),
        "num_layers": rng.choice((1, 2)),
        "learning_rate_scale": rng.choice((1, 0.3)),
    }


def _draw_title_tower(rng, text):
    if text is None or text["tokenizer"] is None or rng.random() < 0.3:
        return "text"
    tokens = {key: text[key] for key in ("tokenizer", "context_length")}
    towers = (
        {"library": "open_clip", "options": CLIP_TEXT},
        {"library": "transformers", "name": "bert", "options": BERT},
    )
    return rng.choice(towers) | tokens | _draw_training(rng)


def _draw_training(rng):
    is_frozen = rng.random() < 0.3
    trained = {"frozen": is_frozen, "projection": rng.choice(("linear", "mlp"))}
    return trained | draw_rates(rng, is_frozen=is_frozen)
