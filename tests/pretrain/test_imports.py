"""Start-up costs: which heavy libraries the modules of pretrain import."""

import subprocess
import sys

import pytest

PRINT_MODULES = "import sys, {}; print(*sorted(name.partition('.')[0] for name in sys.modules))"
BUILDERS = {"accelerate", "deepspeed", "transformers", "timm", "open_clip"}


@pytest.mark.parametrize(
    ("module", "not_loaded"),
    [
        ("pretrain.checkpoint", BUILDERS),
        ("pretrain.checkpoints.writer", BUILDERS),
        ("pretrain.distributed.collectives", BUILDERS),
        ("pretrain.distributed.start", BUILDERS),
        ("pretrain.model.activation_checkpointing", BUILDERS),
        ("pretrain.checkpoints.record", BUILDERS | {"torch", "numpy"}),
        ("pretrain.checkpoints.download", BUILDERS | {"torch", "numpy"}),
        ("pretrain.distributed.launcher", BUILDERS | {"torch", "numpy"}),
        ("pretrain.distributed.deepspeed_config", BUILDERS | {"torch", "numpy"}),
    ],
)
def test_a_module_does_not_load_libraries_before_they_are_used(module, not_loaded):
    command = [sys.executable, "-c", PRINT_MODULES.format(module)]
    loaded = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert loaded & not_loaded == set()
    assert "pretrain" in loaded
