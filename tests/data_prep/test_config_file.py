import pytest

from data_prep.command import run_command
from data_prep.config_file import (
    Section,
    differing_keys,
    fixed_values,
    free,
    read_config,
    to_yaml,
)
from data_prep.errors import (
    ConfigError,
    InputError,
)


class Source(Section):
    name: str
    weight: float = 1.0


class Toy(Section):
    learning_rate: float = 1.0
    mode: str = "none"
    sources: list[Source] = []
    workers: int = free(1)


def read(tmp_path, text, *overrides):
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    return read_config(Toy, path, overrides=overrides)


def test_exponents_are_numbers_and_off_stays_text(tmp_path):
    config = read(tmp_path, "learning_rate: 5e-4\nmode: off\n")
    assert (config.learning_rate, config.mode) == (5e-4, "off")
    assert read(tmp_path, "mode: x\n", "learning_rate=1e-3").learning_rate == 1e-3


def test_unknown_keys_suggest_the_nearest(tmp_path):
    with pytest.raises(
        ConfigError, match=r"unknown key .learning_rat.; did you mean .learning_rat"
    ):
        read(tmp_path, "learning_rat: 1\n")
    with pytest.raises(
        ConfigError, match=r"sources\.0: unknown key 'wieght'; did you mean 'weight"
    ):
        read(tmp_path, "sources: [{name: a, wieght: 2}]\n")


def test_renamed_keys_are_refused_with_their_new_name(tmp_path):
    class Old(Section):
        renamed = {"rate": "learning_rate"}

    class New(Old):
        renamed = {"procs": "workers"}
        learning_rate: float = 1.0
        workers: int = 1

    path = tmp_path / "toy.yaml"
    path.write_text("rate: 1\n")
    with pytest.raises(ConfigError, match=r"toy\.yaml: 'rate' was renamed to 'learning_rate'$"):
        read_config(New, path)
    path.write_text("procs: 2\n")
    with pytest.raises(ConfigError, match=r"toy\.yaml: 'procs' was renamed to 'workers'$"):
        read_config(New, path)


def test_overrides_reach_into_lists(tmp_path):
    text = "sources: [{name: a}, {name: b}]\n"
    config = read(tmp_path, text, "sources.1.weight=0.5", "sources.0.name=c")
    assert [(source.name, source.weight) for source in config.sources] == [("c", 1.0), ("b", 0.5)]
    with pytest.raises(ConfigError, match="expected an index from 0 to 1, found '2'"):
        read(tmp_path, text, "sources.2.weight=0.5")
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        read(tmp_path, text, "sources")


@pytest.mark.parametrize("text", ["", "start:\n", "start: false\n", "start: true\n", "start: {}\n"])
def test_an_override_reaches_into_a_section_that_is_absent_or_only_on_or_off(tmp_path, text):
    class Start(Section):
        step: int = 0

    class Run(Section):
        start: Start | bool = False

    path = tmp_path / "toy.yaml"
    path.write_text(text or "{}\n")
    assert read_config(Run, path, overrides=["start.step=4"]).start == Start(step=4)
    assert read_config(Run, path, overrides=["start.step=4", "start=true"]).start is True
    path.write_text("start: 3\n")
    with pytest.raises(ConfigError, match=r"'start\.step=4': start is 3, which holds no keys"):
        read_config(Run, path, overrides=["start.step=4"])


def test_duplicate_keys_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="duplicate key 'mode'"):
        read(tmp_path, "mode: a\nmode: b\n")


def test_a_wrong_type_says_where_and_what_was_found(tmp_path):
    with pytest.raises(ConfigError, match=r"toy\.yaml: sources\.0\.weight: .*found 'heavy'"):
        read(tmp_path, "sources: [{name: a, weight: heavy}]\n")
    with pytest.raises(ConfigError, match=r"sources\.0\.name: this key is required"):
        read(tmp_path, "sources: [{weight: 1}]\n")


def test_free_fields_may_differ_and_others_are_named():
    old, new = Toy(workers=1, mode="a"), Toy(workers=8, mode="b")
    assert differing_keys(fixed_values(old), fixed_values(new)) == {"mode": ("a", "b")}


def test_exit_status_is_0_done_1_failed_2_wrong_usage(tmp_path, capsys):
    path = tmp_path / "toy.yaml"
    path.write_text("mode: a\n")

    def fail(config):
        raise InputError("the file is empty")

    def status(*arguments, run=print):
        return run_command(
            Toy, run=run, dry_run=print, description="toy", arguments=[str(path), *arguments]
        )

    assert status() == 0
    assert status(run=fail) == 1
    assert "error: the file is empty" in capsys.readouterr().err
    assert status("--dry-run", run=fail) == 0
    assert status("mood=b") == 2
    with pytest.raises(SystemExit, match="2"):
        status("--no-such-flag")
    path.unlink()
    assert status() == 2


def test_texts_that_look_like_numbers_survive_writing_and_reading(tmp_path):
    class Named(Section):
        name: str

    (tmp_path / "a.yaml").write_text(to_yaml(Named(name="1e5")))
    assert read_config(Named, tmp_path / "a.yaml").name == "1e5"


def test_an_override_of_one_place_does_not_reach_another_that_shares_its_anchor(tmp_path):
    class Tower(Section):
        frozen: bool = False

    class Model(Section):
        image: Tower
        audio: Tower

    path = tmp_path / "a.yaml"
    path.write_text("image: &tower {frozen: false}\naudio: *tower\n")
    model = read_config(Model, path, overrides=["image.frozen=true"])
    assert model.image.frozen
    assert not model.audio.frozen
