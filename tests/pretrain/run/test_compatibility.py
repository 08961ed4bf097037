import json

import pytest
from pydantic import BaseModel

from data_prep.config_file import to_yaml
from data_prep.errors import ConfigError
from pretrain.run.compatibility import RunIdentity
from tests.support.toy_run import toy_config

FREE = {
    "micro_batch_size",
    "run.checkpoint_every_steps",
    "run.folder",
    "loading.num_workers",
    "engine.strategy",
    "engine.loss_mode",
    "validation.every_steps",
    "streams.image-text.sources.0.dataset",
}
FIXED = {
    "seed",
    "lanes",
    "model.embed_dim",
    "model.image.name",
    "image.size",
    "audio.log_mel.hop_samples",
    "streams.image-text.weight",
    "streams.image-text.global_batch_size",
    "streams.image-text.sources.1.weight",
    "streams.audio-text.sources.0.name",
    "optimizer.learning_rate",
    "schedule.num_steps",
    "engine.precision",
    "loading.window",
}


def leaves(value, *, key="", is_free=False):
    """Yields (dotted key, whether a resumed run may change it) of a config."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            extra = field.json_schema_extra or {}
            yield from leaves(
                getattr(value, name),
                key=f"{key}.{name}" if key else name,
                is_free=is_free or bool(extra.get("free")),
            )
    elif isinstance(value, dict | list | tuple) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, each in items:
            yield from leaves(each, key=f"{key}.{name}", is_free=is_free)
    else:
        yield key, is_free


def changed(value, names):
    """Returns the same, except that the leaf at the end of the names is "CHANGED"."""
    if not names:
        return "CHANGED"
    name, *others = names
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: changed(getattr(value, name), others)})
    if isinstance(value, dict):
        return value | {name: changed(value[name], others)}
    return [changed(v, others) if str(n) == name else v for n, v in enumerate(value)]


@pytest.fixture
def run(tmp_path):
    config = toy_config(tmp_path, tmp_path / "run", schedule={"shape": "cosine"})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    fingerprints = {"image-text/colors": "aaaa", "validation/image-text": "bbbb"}
    environment = json.dumps({"dataset_fingerprints": fingerprints})
    (tmp_path / "run" / "environment.json").write_text(environment)
    return config, fingerprints


def test_every_field_is_refused_with_both_values_unless_it_is_free(run):
    config, fingerprints = run
    RunIdentity(config, fingerprints).refuse_other_run()
    # Segments and entries of unfreeze may be added: test_train.py has them.
    added = (".segments", ".unfreeze")
    known = {key: is_free for key, is_free in leaves(config) if not key.endswith(added)}
    assert {key for key in FREE | FIXED if known[key] == (key in FIXED)} == set()
    for key, is_free in known.items():
        # Places that would be looked into are put back.
        other = changed(config, key.split("."))
        place = {"folder": config.run.folder, "checkpoint_folder": None}
        other = other.model_copy(update={"run": other.run.model_copy(update=place)})
        if is_free:
            RunIdentity(other, fingerprints).refuse_other_run()
            continue
        with pytest.raises(ConfigError) as raised:
            RunIdentity(other, fingerprints).refuse_other_run()
        told = [line for line in str(raised.value).splitlines() if line.startswith("  ")]
        assert told[0].startswith(f"  {key}: "), told
        assert all(line.startswith("  fingerprint.") for line in told[1:]), told
        assert told[0].endswith(" in the run folder, 'CHANGED' in this config"), told
        assert "run.fork=true" in str(raised.value)


def test_every_fingerprint_is_compared(run):
    config, fingerprints = run
    for key in fingerprints:
        with pytest.raises(
            ConfigError, match=f"fingerprint.{key}: .* in the run folder, 'other' in this config"
        ):
            RunIdentity(config, fingerprints | {key: "other"}).refuse_other_run()


@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_mixed_run_of_an_older_order_is_refused_and_one_of_a_single_source_is_not(run, is_mixed):
    config, fingerprints = run
    stream = config.streams["image-text"]
    sources = [stream.sources[0], stream.sources[0].model_copy(update={"name": "more"})]
    stream = stream.model_copy(update={"sources": sources[: 1 + is_mixed]})
    streams = config.streams | {"image-text": stream}
    config = config.model_copy(update={"streams": streams})
    (config.run.folder / "config.yaml").write_text(to_yaml(config))
    identity = RunIdentity(config, fingerprints | {"mixing/image-text": "version 2"})
    if not is_mixed:
        identity.refuse_other_run()
        return
    with pytest.raises(ConfigError) as refused:
        identity.refuse_other_run()
    assert "fingerprint.mixing/image-text: 'version 1' in the run folder, 'version 2'" in str(
        refused.value
    )
    assert "finish the run with that version" in str(refused.value)
