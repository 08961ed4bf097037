import pytest
import torch

from pretrain.data.batch import StreamLayout, ViewLayout, step_bytes
from pretrain.distributed.collectives import rank
from pretrain.model.tokenizer import build_tokenizer
from pretrain.run.attempts import read_attempts
from pretrain.training.activation_memory import ActivationBytes
from pretrain.training.assembly import open_step_loader
from pretrain.training.memory_budget import bytes_without_graph, loss_bytes, optimizer_bytes
from pretrain.training.micro_batch_size import (
    MemoryEstimate,
    StepSizes,
    estimate_for_plan,
    num_micro_batches_of_size,
)
from tests.pretrain.test_train import assert_same_run, train
from tests.support.gloo_processes import WorkerFailedError, run_in_processes
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model

GRAPHS = {"image-text": ActivationBytes(5, 10), "audio-text": ActivationBytes(0, 20)}
PAIRS = {"image-text": 100, "audio-text": 30}


def estimate_of(*, room=10**9, takes_all=True, num_pairs=PAIRS, activations=GRAPHS):
    besides = {"optimizer": 4, "loss": 3}
    free = 2 * room + 7  # half of the rest is kept free
    return MemoryEstimate(free, besides, num_pairs, activations, takes_all, fraction_kept_free=0.5)


@pytest.mark.parametrize(
    ("room", "takes_all", "num_micro_batches"),
    [
        # 100 pairs of 10 bytes and 5 once, 30 pairs of 20 bytes
        (1605, True, 1),
        (1604, True, 2),  # 505 + 15 * 20
        (805, True, 2),
        (804, True, 3),  # 34 pairs of 10 bytes and 5 once, 10 pairs of 20 bytes
        (545, True, 3),
        (544, True, 4),  # 255 + 8 * 20
        (35, True, 100),  # one pair of each
        (34, True, None),
        # 1005 and one pair of audio, which an empty batch encodes; or 600 and 15 for images
        (1025, False, 1),
        (1024, False, 2),  # 505 + 20
        (-10, True, None),
    ],
)
def test_as_few_micro_batches_are_taken_as_fit(room, takes_all, num_micro_batches):
    assert estimate_of(room=room, takes_all=takes_all).num_micro_batches == num_micro_batches


def test_a_rank_without_pairs_still_encodes_one_row():
    nothing = dict.fromkeys(PAIRS, 0)
    assert estimate_of(num_pairs=nothing, room=35).num_micro_batches == 1
    assert estimate_of(num_pairs=nothing, room=34).num_micro_batches is None


def test_a_decision_is_told_with_its_numbers():
    graphs = {"image-text": ActivationBytes(0, 12_100_000)}
    besides = {"gradients and optimizer": 1_900_000_000, "batches": 100_000_000}
    estimate = MemoryEstimate(10_000_000_000, besides, {"image-text": 1000}, graphs, True, 0.1)
    assert estimate.describe() == (
        "2 micro-batches a step, of at most 500 image-text pairs (12.1 MB each); 8 GB of 10 GB "
        "left after 1.9 GB for gradients and optimizer, 100 MB for batches, 10% of it kept free"
    )
    assert estimate_of(room=0).describe().startswith("not even 1 image-text pairs (1e-05 MB each)")
    assert estimate_of(activations=None).describe().startswith("not even 4 pairs could be encoded")


@pytest.mark.parametrize(
    ("size", "num_processes", "num_micro_batches"),
    [(16, 1, 1), (15, 1, 2), (3, 1, 6), (3, 3, 2), (3, 8, 1)],
)
def test_no_rank_encodes_more_pairs_at_once_than_asked(
    toy_data, tmp_path, size, num_processes, num_micro_batches
):
    config = toy_config(toy_data, tmp_path, micro_batch_size=size)  # 8 lanes of 2 images
    assert (
        num_micro_batches_of_size(StepSizes.of_config(config), num_processes=num_processes)
        == num_micro_batches
    )


@pytest.mark.parametrize(
    ("strategy", "num_processes", "bytes_per_parameter"),
    [
        ("ddp", 1, 12),  # gradient, two moments
        ("ddp", 4, 16),  # and the gradient on its way
        ("zero0", 1, 16),
        ("zero1", 4, 4 + 4 + 16 / 4),  # shared, in addition to the moments: the fp32 copy, the mean
        ("zero2", 8, 4 + 4 + 16 / 8),
        ("zero3", 4, 4 + 2 * 4 + 20 / 4),  # the partition of the parameters; two buckets
    ],
)
def test_strategies_share_what_they_share(
    toy_data, tmp_path, strategy, num_processes, bytes_per_parameter
):
    config = toy_config(toy_data, tmp_path, engine={"strategy": strategy})
    counted = optimizer_bytes(
        config.engine,
        num_trained=1000,
        num_state_values=2000,
        num_processes=num_processes,
        device_type="cpu",
    )
    assert counted == 1000 * bytes_per_parameter


def test_a_gpu_holds_deepspeeds_buckets_whole_and_what_is_offloaded_not(toy_data, tmp_path):
    tuning = tmp_path / "tuning.json"
    tuning.write_text(
        '{"zero_optimization": {"reduce_bucket_size": 5000, "overlap_comm": true, '
        '"offload_optimizer": {"device": "cpu"}}}'
    )
    engine = {"strategy": "zero2", "deepspeed_config": tuning}
    config = toy_config(toy_data, tmp_path / "run", engine=engine)
    share = {"num_trained": 1000, "num_state_values": 2000, "num_processes": 4}
    assert optimizer_bytes(config.engine, device_type="cuda", **share) == 4000 + 2 * 5000 * 4
    assert optimizer_bytes(config.engine, device_type="cpu", **share) == 4000 + 2 * 4000 + 4000


def test_the_loss_takes_features_and_tiles_but_never_all_logits():
    share = {"width": 64, "num_processes": 1, "device_type": "cpu"}
    small = loss_bytes(num_pairs=100, global_num_pairs=100, **share)
    assert small == 4 * 2 * 100 * 64 * 4 + 4 * 100 * 100 * 4 + 80 * 100
    large = loss_bytes(num_pairs=100_000, global_num_pairs=100_000, **share)
    assert large == 4 * 2 * 100_000 * 64 * 4 + 4 * 512 * 2048 * 4 + 80 * 100_000
    of_ranks = loss_bytes(num_pairs=50, global_num_pairs=100, **share | {"num_processes": 2})
    assert of_ranks == small - 4 * 2 * 50 * 64 * 4 + 2 * 100 * 64 * 4


def test_batches_count_where_they_are(toy_data, tmp_path):
    config = toy_config(toy_data, tmp_path)
    views = {
        "image": ViewLayout((16, 16, 3), torch.uint8),
        "text": ViewLayout((12,), torch.int64, has_lengths=True),
    }
    layouts = {"image-text": (StreamLayout(views), 16)}
    share = {"num_trained": 1, "num_state_values": 2, "num_processes": 1}
    share |= {"global_num_pairs": 16, "width": 8, "batches_ahead": 3}
    on_cpu = bytes_without_graph(config.engine, layouts, device_type="cpu", **share)["batches"]
    on_gpu = bytes_without_graph(config.engine, layouts, device_type="cuda", **share)["batches"]
    assert (on_cpu, on_gpu) == (5 * step_bytes(layouts), 2 * step_bytes(layouts))


# ------------------------------------------------------------------------------------------ runs


def free_for(config, num_micro_batches, *, num_processes):
    """Returns the free bytes with which one of several ranks needs so many micro-batches."""
    tokenizer = build_tokenizer(config.model.text)
    loader = open_step_loader(config, tokenizer, rank=0, world_size=num_processes)
    model = build_toy_model(config, tokenizer)
    share = {"num_processes": num_processes, "num_processes_here": 1}
    device = torch.device("cpu")
    estimate = estimate_for_plan(
        StepSizes.of_config(config), model, loader.layouts, device=device, **share
    )
    assert estimate.num_micro_batches == 1
    graphs = estimate.graph_bytes(num_micro_batches) / (1 - estimate.fraction_kept_free)
    return sum(estimate.other_bytes.values()) + round(graphs) + 10


def train_with(config, free_of_rank):
    """Trains where each rank's machine has so many bytes free."""
    from pretrain.training import micro_batch_size

    micro_batch_size.memory_name = lambda device: f"memory of rank {rank()}"
    micro_batch_size.free_bytes = lambda device: free_of_rank[rank()]
    train(config)


@pytest.fixture(scope="module")
def undisturbed(toy_data, tmp_path_factory):
    """Returns the folder of a run of 6 steps, by one process with enough memory."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run_in_processes(1, train, toy_config(toy_data, folder))
    [attempt] = read_attempts(folder)
    assert attempt.num_micro_batches == 1
    return folder


def test_a_process_with_little_memory_gives_the_same_run(toy_data, tmp_path, undisturbed):
    config = toy_config(toy_data, tmp_path / "run", micro_batch_size="auto")
    free = free_for(config, 5, num_processes=1)
    run_in_processes(1, train_with, config, [free])
    [attempt] = read_attempts(tmp_path / "run")
    assert 1 < attempt.num_micro_batches <= 5
    assert_same_run(tmp_path / "run", undisturbed)


def test_ranks_take_what_the_neediest_of_them_needs(toy_data, tmp_path, undisturbed):
    config = toy_config(toy_data, tmp_path / "run", micro_batch_size="auto")
    free = free_for(config, 4, num_processes=2)
    run_in_processes(2, train_with, config, [10 * free, free])
    [attempt] = read_attempts(tmp_path / "run")
    assert attempt.num_micro_batches == 4
    assert_same_run(tmp_path / "run", undisturbed)


def test_without_room_for_a_pair_every_rank_says_so_and_nothing_is_written(toy_data, tmp_path):
    config = toy_config(toy_data, tmp_path / "run", micro_batch_size="auto")
    with pytest.raises(WorkerFailedError) as failure:
        run_in_processes(2, train_with, config, [10**12, 10**6])
    assert "InputError: micro_batch_size auto: rank 1: not even 1 image-text" in str(failure.value)
    assert "set engine.activation_checkpointing" in str(failure.value)
    assert not (tmp_path / "run" / "attempts").exists()
