import pytest
import torch
from torch.nn import functional

from data_prep.errors import InputError
from pretrain.distributed.engine import Engine
from pretrain.distributed.start import start_accelerator
from pretrain.model.tokenizer import build_tokenizer
from pretrain.objectives.objective import ObjectiveLoss
from pretrain.training.assembly import build_training_optimizer, open_validation_sets
from pretrain.training.validation import RunningMean, validate
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config, toy_members, write_toy_dataset
from tests.support.toy_towers import build_toy_model


def validated(config):
    """Returns the metrics, and the untrained model's features of all pairs."""
    accelerator = start_accelerator(config.engine, run=config.run)
    tokenizer = build_tokenizer(config.model.text)
    model = build_toy_model(config, tokenizer)
    optimizer = build_training_optimizer(config, model)
    engine = Engine(accelerator, model=model, optimizer=optimizer, gradient_clipping=None)
    [held_out] = open_validation_sets(config, tokenizer)
    figures = validate(engine, held_out)["image-text/image-text"]
    assert engine.model.training
    reader = held_out.reader
    samples = [reader.read_exactly(ordinal) for ordinal in range(len(reader.dataset))]
    with torch.no_grad():
        media = model.encode_image(torch.stack([sample["image"][0] for sample in samples]))
        text = model.encode_text(torch.stack([sample["text"][0] for sample in samples]))
    engine.close()
    return figures, media.tolist(), text.tolist()


def validating(toy_data, tmp_path, dataset, batch_size):
    validation = {"streams": {"image-text": {"dataset": dataset, "batch_size": batch_size}}}
    return toy_config(toy_data, tmp_path / "run", validation=validation)


def test_figures_are_those_of_the_obvious_way_for_any_number_of_processes(toy_data, tmp_path):
    config = validating(toy_data, tmp_path, toy_data / "more_colors", 10)  # 10, 10 and 5 pairs
    results = run_in_processes(1, validated, config) + run_in_processes(3, validated, config)
    _, media, text = results[0]
    scale = config.model.logit_scale.initial
    losses, hits = [], []
    for rows in (slice(0, 10), slice(10, 20), slice(20, 25)):
        logits = scale * torch.tensor(media)[rows] @ torch.tensor(text)[rows].T
        own = torch.arange(len(logits))
        both = functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)
        losses += [both.item() / 2] * len(logits)
        hits += (logits.argmax(dim=1) == own).tolist()
    for figures, _, _ in results:
        assert figures["loss"] == pytest.approx(sum(losses) / 25, rel=1e-5)
        assert figures["image_to_text_recall@1"] == pytest.approx(sum(hits) / 25, abs=1e-6)


def test_means_over_tokens_are_weighted_by_their_number():
    mean = RunningMean()
    for loss, num_tokens in ((2.0, 1), (5.0, 8), (9.0, 0)):
        mean.add(ObjectiveLoss(torch.zeros(()), loss, 4, {"a": 1.0}, num_averaged=num_tokens))
    assert mean.values() == {"loss": (2 + 5 * 8) / 9, "a": 1.0}
    assert mean.num_samples == 12


def test_a_held_out_pair_that_does_not_decode_is_named(toy_data, tmp_path, monkeypatch):
    def with_one_bad(media, number):
        return toy_members(media, number) | ({"png": b"GIF89a"} if number == 3 else {})

    monkeypatch.setattr("tests.support.toy_run.toy_members", with_one_bad)
    bad = write_toy_dataset(tmp_path / "bad", "image", shard_sizes=(8,))
    config = validating(toy_data, tmp_path, bad, 4)
    tokenizer = build_tokenizer(config.model.text)
    [held_out] = open_validation_sets(config, tokenizer)
    with pytest.raises(InputError, match=r"validation\.streams\.image-text: .*sample 000003"):
        list(held_out.batches())
