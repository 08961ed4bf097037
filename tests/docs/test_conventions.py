"""What STYLE asks of the whole tree: the arrows between packages, and documentation that runs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data_prep", "pretrain", "eval")
SHARED_MODULES = {
    "shard_format",
    "config_file",
    "media_decode",
    "remote_file",
    "file_transfer",
    "html_report",
    "subset",
}
# Of data_prep, for eval: what near-duplicates are found by; config says when they are near.
FINGERPRINTS = {
    "audio_fingerprint",
    "audio_neighbours",
    "config",
    "image_fingerprint",
    "near_images",
}
# Of pretrain, for eval. The rest of pretrain is the training loop's own.
PRETRAIN_MODULES = {
    "attempts",
    "checkpoint",
    "checkpoint_record",
    "checkpoint_store",
    "config",
    "gather",
    "launcher",
    "model",
    "run_folder",
    "sample_order",
    "shard_reader",
    "tokenizer",
}
ENTRY_POINTS = {
    "data_prep.make_shards",
    "data_prep.verify_shards",
    "data_prep.index_shards",
    "data_prep.describe",
    "data_prep.find_duplicates",
    "data_prep.finalize",
    "data_prep.make_demo_data",
    "data_prep.make_subset",
    "pretrain.train",
    "pretrain.preflight",
    "pretrain.status",
    "pretrain.requeue",
    "eval.compare",
    "eval.evaluate",
    "eval.embed",
    "eval.watch",
    "eval.check_overlap",
    "eval.search",
}


def modules_of(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path):
    """Full names of everything a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


ALL_IMPORTS = [
    (path.relative_to(ROOT), name)
    for package in PACKAGES
    for path in modules_of(package)
    for name in imports_of(path)
]


def test_arrows_between_packages_are_those_of_the_design():
    allowed = {
        "data_prep": {},
        "pretrain": {"data_prep": SHARED_MODULES},
        "eval": {"data_prep": SHARED_MODULES | FINGERPRINTS, "pretrain": PRETRAIN_MODULES},
    }
    for path, name in ALL_IMPORTS:
        package, _, module = name.partition(".")
        if package in PACKAGES and package != path.parts[0]:
            assert module in allowed[path.parts[0]].get(package, ()), f"{path} imports {name}"


def test_accelerate_and_deepspeed_appear_only_in_the_engine():
    for path, name in ALL_IMPORTS:
        if name.partition(".")[0] in ("accelerate", "deepspeed"):
            assert path in (
                Path("pretrain/distributed/engine.py"),
                Path("pretrain/distributed/zero.py"),
            ), name


def test_nothing_imports_an_entry_point():
    for path, name in ALL_IMPORTS:
        assert name not in ENTRY_POINTS, f"{path} imports {name}"


def test_data_prep_starts_without_torch():
    for path, name in ALL_IMPORTS:
        if path.parts[0] == "data_prep":
            assert name.partition(".")[0] not in ("torch", "transformers", "timm"), path


@pytest.mark.parametrize("word", ["utils", "helpers", "common", "misc"])
def test_every_module_has_a_home(word):
    assert not [path for package in PACKAGES for path in modules_of(package) if path.stem == word]


def test_every_module_says_what_it_is_for():
    for package in PACKAGES:
        for path in modules_of(package):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_sources_are_plain_ascii():
    for package in (*PACKAGES, "configs", "tests"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".yaml", ".json"):
                path.read_text(encoding="ascii")
