"""Word vectors and GRUs as text towers: values, files, runs and checkpoints."""

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from pretrain.checkpoint import load_model
from pretrain.model.caption_trimming import takes_trimmed_captions
from pretrain.model.tokenizer import build_tokenizer
from pretrain.model.towers import build_text_backbone
from pretrain.settings.model import TextTower
from pretrain.towers.word_vectors import read_word_vectors
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config

WORDS = {"picture": (1, 2, 3), "is": (0.5, -1, 2e-1), "red": (4, 0, -3), "sound": (1, 1, 1)}


@pytest.fixture
def vectors(tmp_path):
    """Writes the vectors of four words in text format."""
    path = tmp_path / "words.vec"
    lines = [f"{word} {' '.join(map(str, values))}" for word, values in WORDS.items()]
    path.write_text("\n".join(["4 3", *lines]) + "\n")
    return path


def word_tower(path, **more):
    config = TextTower(
        library="torch", name="word_vectors", pretrained=str(path), context_length=8, **more
    )
    tokenizer = build_tokenizer(config)
    return tokenizer, build_text_backbone(config, tokenizer=tokenizer)


def test_a_caption_is_the_mean_of_its_words(vectors):
    tokenizer, backbone = word_tower(vectors)
    features = backbone(tokenizer(["The picture IS red", "picture", "", "nothing known"]))
    unknown = np.mean(list(WORDS.values()), axis=0)
    known = [WORDS[word] for word in ("picture", "is", "red")]
    expected = [np.mean([unknown, *known], axis=0), WORDS["picture"], unknown, unknown]
    torch.testing.assert_close(features, torch.tensor(np.array(expected), dtype=torch.float32))


def test_the_largest_number_of_each_column_may_be_pooled(vectors):
    tokenizer, backbone = word_tower(vectors, pooling="max")
    torch.testing.assert_close(
        backbone(tokenizer(["picture is red"])), torch.tensor([[4.0, 2.0, 3.0]])
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a 1 2\nb 1\n", "line 2: expected a word and 2 numbers, found 1"),
        ("a 1 nan\n", "line 1: expected a word and finite numbers"),
        ("a\n", "line 1: expected a word and finite numbers"),
        ("", "expected lines of a word and numbers, found none"),
        ("2 3\n", "expected lines of a word and numbers, found none"),
    ],
)
def test_damaged_files_are_refused(tmp_path, text, reason):
    path = tmp_path / "words.vec"
    path.write_text(text)
    with pytest.raises(InputError, match=reason):
        read_word_vectors(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a text file of word vectors: No such file"):
        word_tower(tmp_path / "words.vec")
    config = TextTower(library="torch", name="word_vectors")
    with pytest.raises(InputError, match="word_vectors needs the path of a text file"):
        build_tokenizer(config)


def test_words_with_spaces_and_repeated_words_are_read(tmp_path):
    path = tmp_path / "words.vec"
    path.write_text("new york 1 2\ndog 3 4\ndog 5 6\nlast 7 8\n", newline="\n")
    found = read_word_vectors(path, max_words=2)
    assert found.words == ["new york", "dog"]
    assert found.values.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "lstm"}, "expected one of word_vectors, gru with library: torch, found 'lstm'"),
        ({"options": {"widht": 8}}, "expected width, num_layers, is_bidirectional for gru"),
        ({"pretrained": "weights.pt"}, "a gru has no released weights"),
    ],
)
def test_other_settings_are_refused(changes, reason):
    config = TextTower(**({"library": "torch", "name": "gru"} | changes))
    with pytest.raises(InputError, match=reason):
        build_text_backbone(config, tokenizer=build_tokenizer(config))


@pytest.mark.parametrize("pooling", ["own", "mean", "max", "last"])
@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_a_caption_of_a_gru_does_not_depend_on_padding(pooling, is_bidirectional):
    config = TextTower(
        library="torch",
        name="gru",
        context_length=12,
        pooling=pooling,
        options={"width": 8, "num_layers": 2, "is_bidirectional": is_bidirectional},
    )
    tokenizer = build_tokenizer(config)
    backbone = build_text_backbone(config, tokenizer=tokenizer).double()
    assert takes_trimmed_captions(backbone, tokenizer)
    tokens = tokenizer(["a red circle", "a dog that barks"])
    expected = backbone(tokens)
    assert expected.shape == (2, 8)
    torch.testing.assert_close(backbone(tokens[:, :8]), expected)


def train(config):
    from pretrain.train import pretrain

    pretrain(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["word_vectors", "gru"])
def test_small_towers_train_and_are_loaded_without_the_file(toy_data, tmp_path, vectors, name):
    text = {"library": "torch", "name": name, "options": {}, "context_length": 12}
    if name == "gru":
        text["options"] = {"width": 8, "is_bidirectional": True}
    else:
        text["pretrained"] = str(vectors)
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders, start=1):
        config = toy_config(toy_data, folder, model={"text": text})
        strategy = {"strategy": "zero3" if number == 2 else "ddp"}
        engine = config.engine.model_copy(update=strategy)
        run_in_processes(number, train, config.model_copy(update={"engine": engine}))
    vectors.unlink()
    embeddings = []
    for folder in folders:
        model, _, tokenizer = load_model(folder)
        embeddings.append(model.encode_text(tokenizer(["picture 3 is red", "a sound"])))
    torch.testing.assert_close(embeddings[0], embeddings[1], rtol=0, atol=1e-4)
