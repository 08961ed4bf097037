"""Documentation is executed: every command and config, as far as a dry run goes, on a small demo;
every link is followed."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.support.commands import COMMANDS as ALL_COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
VERBS = {
    "data_prep": "data_prep.make_shards",
    "pretrain": "pretrain.train",
    "eval": "eval.evaluate",
}
# Configs whose verb is another.
OTHER_VERBS = {
    "demo_data.yaml": "data_prep.make_demo_data",
    "describe.yaml": "data_prep.describe",
    "duplicates.yaml": "data_prep.find_duplicates",
    "verify.yaml": "data_prep.verify_shards",
    "index.yaml": "data_prep.index_shards",
    "subset.yaml": "data_prep.make_subset",
    "embed.yaml": "eval.embed",
    "compare.yaml": "eval.compare",
    "watch.yaml": "eval.watch",
    "overlap.yaml": "eval.check_overlap",
    "search.yaml": "eval.search",
}
CONFIGS = sorted(path for folder in VERBS for path in (ROOT / "configs" / folder).glob("*.yaml"))
SHELL_LINES = sorted(
    {
        line
        for page in PAGES
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
        for line in block.splitlines()
    }
)
COMMANDS = [line for line in SHELL_LINES if re.search(r"-m (data_prep|pretrain|eval)\.", line)]


def run_in_this_process(monkeypatch, verb, arguments):
    """Exit status of `python -m verb arguments`."""
    monkeypatch.setattr(sys, "argv", [verb, *arguments])
    return importlib.import_module(verb).main()


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """A folder with everything that README and configs name, from a small `make demo`."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "configs").symlink_to(ROOT / "configs")
        sizes = ["scenes_per_combination=1", "clips_per_sound=6", "pairs_per_object=3"]
        arguments = ["configs/data_prep/demo_data.yaml", *sizes, "workers=1"]
        assert run_in_this_process(patch, "data_prep.make_demo_data", arguments) == 0
        for name in ("digits", "scenes", "sounds", "objects"):
            for split in ("train", "validation", "test"):
                arguments = [
                    f"configs/data_prep/demo_{name}.yaml",
                    f"input=demo/data/{name}/{split}.tsv",
                    f"output=demo/datasets/{name}_{split}",
                ]
                assert run_in_this_process(patch, "data_prep.make_shards", arguments) == 0
        for run in ("demo/run", "demo/run_objects", "demo/captions_run", "runs/my_sounds"):
            (folder / run / "checkpoints" / "step_00000001").mkdir(parents=True)
        (folder / "demo/run/config.yaml").write_text("run: {}")  # which eval.watch looks for
        for results in ("demo/results", "results/mine"):
            (folder / results).mkdir(parents=True)
            record = {"evaluations": {"x": {"task": "retrieval", "dataset": {"fingerprint": "1"}}}}
            (folder / results / "results.json").write_text(json.dumps(record))
        (folder / "my_sounds").symlink_to(folder / "demo/data/sounds")
        (folder / "datasets").mkdir()
        for split in ("train", "test"):
            arguments = [
                "configs/data_prep/audio.yaml",
                f"input=my_sounds/{split}.tsv",
                f"output=datasets/my_sounds_{split}",
                "workers=1",
            ]
            assert run_in_this_process(patch, "data_prep.make_shards", arguments) == 0
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_config_passes_a_dry_run(small_demo, path, monkeypatch, capsys):
    monkeypatch.chdir(small_demo)
    verb = OTHER_VERBS.get(path.name, VERBS[path.parent.name])
    config = str(path.relative_to(ROOT))
    assert run_in_this_process(monkeypatch, verb, [config, "--dry-run"]) == 0, capsys.readouterr()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_passes_a_dry_run(small_demo, command, monkeypatch, capsys):
    monkeypatch.chdir(small_demo)
    words = [word for word in shlex.split(command) if word != "--dry-run"]
    verb, *arguments = words[words.index("-m") + 1 :]
    status = run_in_this_process(monkeypatch, verb, [*arguments, "--dry-run"])
    assert status == 0, capsys.readouterr()


@pytest.mark.parametrize("line", [line for line in SHELL_LINES if line not in COMMANDS])
def test_other_shell_lines_name_targets_scripts_and_configs_that_exist(line):
    words = shlex.split(line, comments=True)
    makefile = (ROOT / "Makefile").read_text()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), line
        return
    scripts = [word for word in words if word.startswith("slurm/")]
    assert scripts, f"no test knows how to check {line!r}"
    for path in (*scripts, *(word for word in words if word.startswith("configs/"))):
        assert (ROOT / path).exists(), line


def test_the_commands_of_every_package_are_documented():
    documented = {re.search(r"-m ([\w.]+)", command)[1] for command in COMMANDS}
    documented |= set(re.findall(r"-m ((?:data_prep|pretrain|eval)\.\w+)", "".join(texts())))
    assert set(ALL_COMMANDS) - documented <= {"data_prep.make_demo_data"}  # a part of make demo


def texts():
    return [page.read_text() for page in PAGES]


def test_the_readme_is_short_and_has_the_two_commands():
    assert len(README.splitlines()) <= 150
    assert "make demo" in README
    assert "make test" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    for link in links:
        assert "://" not in link, (
            "links lead into the repository: the web is not reachable in tests"
        )
        assert (page.parent / link).exists(), link


def test_a_dry_run_prints_the_derived_numbers_and_writes_nothing(small_demo, monkeypatch, capsys):
    monkeypatch.chdir(small_demo)
    before = sorted(small_demo.rglob("*"))
    assert (
        run_in_this_process(
            monkeypatch, "pretrain.train", ["configs/pretrain/demo.yaml", "--dry-run"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    for figure in ("steps per epoch", "per lane", "micro-batches a step", "a step reads"):
        assert figure in printed
    assert sorted(small_demo.rglob("*")) == before
