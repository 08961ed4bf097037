"""CPU time and extra peak memory of the exact loss, open_clip's and torch's.

    python -m tests.benchmarks.loss [--threads 1]

Forward and backward pass of one rank, float32, D = 512. One process simulates all ranks: torch's
"fake" process group answers each collective at once with this rank's own rows. So no time is spent
on communication, and memory is that of a real rank. Each measurement runs in its own process,
forked before the features exist, and counts memory above what was resident. For GPUs see
loss_gpu.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.distributed.collectives import rank, world_size
from pretrain.loss.contrastive_loss import contrastive_loss
from pretrain.loss.options import LossOptions

WIDTH = 512
SIZES = [(16384, 2), (32768, 8), (131072, 64)]
NUM_RUNS = 2
LONG_SECONDS = 20  # longer runs are not repeated
SCALE = 1 / 0.07


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--threads", type=int, default=1)
    threads = arguments.parse_args().threads
    for num_pairs, num_ranks in SIZES:
        print(f"N = {num_pairs:,}, one rank of {num_ranks}")
        results = {
            name: measured(loss, num_pairs, num_ranks, threads) for name, loss in LOSSES.items()
        }
        for name, measured_loss in results.items():
            print(f"  {name:16}", shown(measured_loss, results["open_clip"], results["torch"]))


def shown(results: tuple[float, float], of_open_clip: tuple, of_torch: tuple) -> str:
    seconds, megabytes = results
    times = (
        f"{seconds / of_open_clip[0]:.2f} of open_clip's, {seconds / of_torch[0]:.2f} of torch's"
    )
    less = f"1 / {of_open_clip[1] / megabytes:.1f} of open_clip's"
    return f"{seconds:6.2f} s ({times})  {megabytes:6.0f} MB ({less})"


def measured(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], num_pairs: int, num_ranks: int, threads: int
) -> tuple[float, float]:
    """Returns (CPU seconds of the best run, extra peak memory of the first run in MB)."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=run, args=(sender, loss, num_pairs, num_ranks, threads))
    process.start()
    sender.close()
    results = receiver.recv()
    process.join()
    return results


def run(sender, loss, num_pairs, num_ranks, threads):
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)  # from collectives that open_clip uses
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(2, num_pairs // num_ranks, WIDTH, generator=generator)
    media, text = functional.normalize(sides, dim=-1)
    warm_up = [side[:8].clone().requires_grad_() for side in (media, text)]
    loss(*warm_up, torch.tensor([SCALE], requires_grad=True)).backward()
    resident, seconds, peak = resident_bytes(), [], 0
    for _ in range(NUM_RUNS):
        leaves = [x.clone().requires_grad_() for x in (media, text, torch.tensor([SCALE]))]
        start = time.process_time()
        loss(*leaves).backward()
        seconds.append(time.process_time() - start)
        # ru_maxrss is the peak since the process began, so only the first run counts.
        peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if seconds[0] > LONG_SECONDS:
            break
    sender.send((min(seconds), (peak - resident) / 1e6))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def our_loss(mode: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(media, text, scale):
        counts = [len(media)] * world_size()
        options = LossOptions(mode=mode)
        return contrastive_loss(media, text, scale, options=options, counts=counts).for_backward

    return loss


def open_clip_loss(media, text, scale):
    """Computes open_clip's loss with the only options that are exact for several ranks."""
    exact = open_clip.ClipLoss(
        local_loss=True, gather_with_grad=True, rank=rank(), world_size=world_size()
    )
    return exact(media, text, scale)


def torch_loss(media, text, scale):
    """Computes the loss with torch's chunked linear_cross_entropy and differentiable gathers."""
    all_media, all_text = (
        torch.cat(torch.distributed.nn.all_gather(side)) for side in (media, text)
    )
    own = torch.arange(len(media), device=media.device) + rank() * len(media)
    directions = ((media, all_text), (text, all_media))
    return (
        sum(
            functional.linear_cross_entropy(
                (scale * queries).to(keys.dtype), keys, own, options=CHUNKS
            )
            for queries, keys in directions
        )
        / 2
    )


CHUNKS = torch.nn.LinearCrossEntropyOptions()
CONTEXT = multiprocessing.get_context("fork")
LOSSES = {
    "open_clip": open_clip_loss,
    "torch": torch_loss,
    "isopair strip1": our_loss("strip1"),
    "isopair strip2": our_loss("strip2"),
}

if __name__ == "__main__":
    main()
