"""Time and memory of the exact loss on one GPU, compared with open_clip's and torch's.

    python -m tests.benchmarks.loss_gpu [--blocks] [--tiny]

Forward and backward pass of rank 0 of W, bfloat16 features, D = 768. As in loss.py, torch's "fake"
process group answers each collective at once. So no time is spent on communication, and memory is
that of a real rank. Time: CUDA events, median of 50 runs. Memory: the peak above what was allocated
before. The four matrix products that the softmax loss needs are timed for comparison.

    --blocks    also times other block sizes than those of feature_tiles
    --tiny      runs small sizes to test this script, also without a GPU
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.loss import contrastive_loss as loss_module
from pretrain.loss import feature_tiles
from pretrain.loss.backend import Backend
from pretrain.loss.feature_tiles import Blocks
from tests.benchmarks.loss import SCALE, open_clip_loss, our_loss, torch_loss

WIDTH = 768
TIMED = [(4096, 8), (16384, 8), (32768, 8), (131072, 8)]  # N, W
WEIGHED = [(32768, 8, 0.10), (1048576, 32, 0.40)]  # N, W, goal in GB
LARGEST = (12_582_912, 32)
TINY = {"timed": [(64, 2), (128, 4)], "weighed": [(128, 4, 0.1)], "largest": (256, 4)}
NUM_WARM_UPS, NUM_RUNS = 10, 50
CANDIDATES = [
    Blocks(128, 128, 64, num_warps=8, num_stages=3),
    Blocks(128, 128, 64, num_warps=8, num_stages=4),
    Blocks(128, 128, 64, num_warps=4, num_stages=3),
    Blocks(128, 256, 64, num_warps=8, num_stages=3),
    Blocks(256, 128, 64, num_warps=8, num_stages=3),
    Blocks(64, 256, 64, num_warps=4, num_stages=3),
]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # from collectives that open_clip uses
    if not torch.cuda.is_available() and not arguments.tiny:
        print("No GPU: nothing is measured; --tiny tests the script.")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, D = {WIDTH}, bfloat16")
    sizes = TINY if arguments.tiny else {"timed": TIMED, "weighed": WEIGHED, "largest": LARGEST}
    num_runs = 2 if arguments.tiny else NUM_RUNS
    for num_pairs, num_ranks in sizes["timed"]:
        print_times(num_pairs, num_ranks, device, num_runs)
    for num_pairs, num_ranks, goal in sizes["weighed"]:
        print_memory(num_pairs, num_ranks, device, goal)
    print_largest(*sizes["largest"], device)
    if arguments.blocks:
        print_times_of_blocks(*sizes["timed"][-1], device, num_runs)


# ---------------------------------------------------------------------------------- what is run


def in_autocast(loss: Loss) -> Loss:
    """Wraps a loss in autocast, as open_clip's training does."""

    def autocast_loss(media: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast(media.device.type, dtype=torch.bfloat16):
            return loss(media, text, scale)

    return autocast_loss


def by_backend(mode: str, backend: Backend) -> Loss:
    """Returns this project's loss with a fixed backend."""
    loss = our_loss(mode)

    def forced_loss(media: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        with replaced(loss_module, "choose_backend", lambda *_, **__: backend):
            return loss(media, text, scale)

    return forced_loss


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def playing_rank_0(num_ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def leaves(num_rows: int, device: torch.device) -> list[Tensor]:
    """Returns media, text and scale; each requires a gradient."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (num_rows, WIDTH)
    sides = [torch.randn(shape, generator=generator, device=device) for _ in range(2)]
    media, text = (functional.normalize(side, dim=-1).bfloat16() for side in sides)
    return [x.requires_grad_() for x in (media, text, torch.tensor([SCALE], device=device))]


def losses(device: torch.device) -> dict[str, Loss]:
    modes = ("strip1", "strip2")
    ours = {f"isopair {mode}, library": by_backend(mode, "library") for mode in modes}
    if device.type == "cuda":
        ours |= {f"isopair {mode}, triton": by_backend(mode, "triton") for mode in modes}
    return {"open_clip": in_autocast(open_clip_loss), "torch": torch_loss} | ours


def products(num_rows: int, num_pairs: int, device: torch.device) -> Callable[[], None]:
    """Returns a function that computes only the four products that the softmax loss needs."""
    media, text, gradient = (
        torch.randn(*shape, device=device, dtype=torch.bfloat16)
        for shape in ((num_rows, WIDTH), (num_pairs, WIDTH), (num_rows, num_pairs))
    )
    logits = torch.empty_like(gradient)
    of_media, of_text = torch.empty_like(media), torch.empty_like(text)

    def run() -> None:
        torch.mm(media, text.T, out=logits)
        torch.mm(media, text.T, out=logits)
        torch.mm(gradient, text, out=of_media)
        torch.mm(gradient.T, media, out=of_text)

    return run


# ------------------------------------------------------------------------------ how it is measured


def median_ms(run: Callable[[], None], device: torch.device, num_runs: int) -> float:
    for _ in range(min(NUM_WARM_UPS, num_runs)):
        run()
    return statistics.median(one_ms(run, device) for _ in range(num_runs))


def one_ms(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def step_of(loss: Loss, inputs: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for leaf in inputs:
            leaf.grad = None
        loss(*inputs).backward()

    return run


def peak_gigabytes(run: Callable[[], None], device: torch.device) -> float:
    """Measures the peak above what was allocated before, gradients included."""
    if device.type != "cuda":
        run()
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


# ------------------------------------------------------------------------------------ what is shown


def print_times(num_pairs: int, num_ranks: int, device: torch.device, num_runs: int) -> None:
    """Prints times; goals at N = 32,768: open_clip / 2 (library) or 2.5 (Triton)."""
    num_rows = num_pairs // num_ranks
    print(f"N = {num_pairs:,}, rank 0 of {num_ranks}")
    bare = median_ms(products(num_rows, num_pairs, device), device, num_runs)
    print(f"  {'four products':24} {bare:9.3f} ms")
    of_open_clip = None
    with playing_rank_0(num_ranks):
        inputs = leaves(num_rows, device)
        for name, loss in losses(device).items():
            try:
                found = median_ms(step_of(loss, inputs), device, num_runs)
            except torch.cuda.OutOfMemoryError:
                print(f"  {name:24} does not fit")
                continue
            of_open_clip = of_open_clip or found
            print(
                f"  {name:24} {found:9.3f} ms  open_clip's / {of_open_clip / found:.2f}  "
                f"products are {bare / found:.0%} of it"
            )


def print_memory(num_pairs: int, num_ranks: int, device: torch.device, goal: float) -> None:
    print(f"N = {num_pairs:,}, rank 0 of {num_ranks}: peak, goal {goal:.2f} GB")
    with playing_rank_0(num_ranks):
        for mode in ("strip1", "strip2"):
            loss = our_loss(mode)
            step_of(loss, leaves(64, device))()  # compiles
            inputs = leaves(num_pairs // num_ranks, device)
            found = peak_gigabytes(step_of(loss, inputs), device)
            print(f"  isopair {mode:16} {found:9.3f} GB")


def print_largest(num_pairs: int, num_ranks: int, device: torch.device) -> None:
    print(f"N = {num_pairs:,}, rank 0 of {num_ranks}: one step, goals 60 s and 3.5 GB")
    with playing_rank_0(num_ranks):
        loss = our_loss("auto")
        step_of(loss, leaves(64, device))()
        run = step_of(loss, leaves(num_pairs // num_ranks, device))
        times = []
        memory = peak_gigabytes(lambda: times.append(one_ms(run, device)), device)
        print(f"  isopair auto            {times[0] / 1000:9.2f} s  {memory:.2f} GB")


def print_times_of_blocks(
    num_pairs: int, num_ranks: int, device: torch.device, num_runs: int
) -> None:
    print(f"N = {num_pairs:,}, rank 0 of {num_ranks}, by blocks of the kernels")
    with playing_rank_0(num_ranks):
        step = step_of(our_loss("strip1"), leaves(num_pairs // num_ranks, device))
        for blocks in CANDIDATES:
            chosen = feature_tiles.BLOCKS | {torch.bfloat16: blocks}
            with replaced(feature_tiles, "BLOCKS", chosen):
                print(f"  {median_ms(step, device, num_runs):9.3f} ms  {blocks}")


if __name__ == "__main__":
    main()
