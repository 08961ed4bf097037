"""The commands of the project, as `python -m` takes them."""

COMMANDS = (
    "data_prep.describe",
    "data_prep.finalize",
    "data_prep.find_duplicates",
    "data_prep.index_shards",
    "data_prep.make_demo_data",
    "data_prep.make_shards",
    "data_prep.make_subset",
    "data_prep.verify_shards",
    "pretrain.fetch",
    "pretrain.preflight",
    "pretrain.requeue",
    "pretrain.status",
    "pretrain.train",
    "eval.check_overlap",
    "eval.compare",
    "eval.embed",
    "eval.evaluate",
    "eval.search",
    "eval.watch",
)
