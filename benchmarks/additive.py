"""The additive experiments against the published algorithm in PyTorch.

    python -m benchmarks.additive [--only 2d 10d relu] [--epochs 20] [--torch PYTHON]

Ours is the command of a figure as a user runs it, with 20 repeats, in a process of its own:
starting Python, compilation, computation, drawing. PyTorch takes `--epochs` epochs of one repeat
after a few to warm up, and the time is multiplied to 20 repeats of 5300 epochs. Prints seconds on
the clock and of the processor; only the latter mean something while others use the machine.
`--torch` is a Python that has torch and NumPy, by default this one.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time


SIZES = {"2d": (2, 1000), "10d": (10, 10_000), "relu": (1, 1000)}
REPEATS, EPOCHS = 20, 5300


def published(kind: str, epochs: int) -> dict[str, float]:
    """Seconds of one epoch: float32 data and parameters, autograd, one SGD optimizer a layer."""
    import torch

    dimensions, samples = SIZES[kind]
    x, u = torch.rand(dimensions, samples), torch.rand(10, dimensions)
    weights = torch.nn.Parameter(3 * torch.rand(10, dimensions))
    places = torch.nn.Parameter(u)
    half = torch.tensor(0.5)

    def step(z):
        rising = (4 * (z + 0.5) ** 3).clamp(torch.zeros(()), half)
        return rising + (0.5 - 4 * (0.5 - z) ** 3).clamp(torch.zeros(()), half)

    def network():
        gaps = x - places[..., None]
        units = torch.relu(gaps) if kind == "relu" else step(gaps / 0.01)
        return (weights[..., None] * units).sum(dim=(0, 1))

    if kind == "relu":
        y = sum(a * torch.relu(x[0] - v) for a, v in ((1.0, 0.3), (-2.0, 0.5), (3.0, 0.7)))
    else:
        y = sum((x > v).double().sum(dim=0) for v in (0.3, 0.5, 0.7))
    fast, slow = torch.optim.SGD([weights], lr=1.0), torch.optim.SGD([places], lr=0.01)
    clocks = (time.perf_counter, time.process_time)
    for count in (3, epochs):
        began = [clock() for clock in clocks]
        for _ in range(count):
            fast.zero_grad()
            slow.zero_grad()
            (torch.linalg.vector_norm(network() - y) / samples).backward()
            fast.step()
            slow.step()
    wall, processor = (clock() - start for clock, start in zip(clocks, began, strict=True))
    return {"wall": wall / epochs, "processor": processor / epochs}


def ours(kind: str) -> dict[str, float]:
    """Seconds of the whole command."""
    with tempfile.TemporaryDirectory() as out:
        command = ["-m", "tts_jax.cli", "reproduce", f"figure_{kind}", "--out", out]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.perf_counter() - began, "processor": used}


def main() -> None:
    """Time both and print a table."""
    parser = argparse.ArgumentParser(description="Additive experiments against PyTorch.")
    parser.add_argument("--only", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--torch", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--peer", choices=tuple(SIZES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        print(json.dumps(published(given.peer, given.epochs)))
        return
    print(f"{REPEATS} repeats of {EPOCHS} epochs, {os.cpu_count()} processors; seconds")
    print(f"{'':6} {'ours':>18} {'PyTorch':>20} {'ratio':>14}")
    print(f"{'':6} {'wall':>8} {'processor':>9} {'wall':>10} {'processor':>9} {'wall':>6} proc.")
    for kind in given.only:
        command = [given.torch, os.path.abspath(__file__), "--peer", kind]
        command += ["--epochs", str(given.epochs)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peer = {name: REPEATS * EPOCHS * one for name, one in json.loads(said).items()}
        mine = ours(kind)
        ratios = [peer[name] / mine[name] for name in ("wall", "processor")]
        print(
            f"{kind:6} {mine['wall']:8.1f} {mine['processor']:9.1f} {peer['wall']:10.0f} "
            f"{peer['processor']:9.0f} {ratios[0]:6.0f} {ratios[1]:5.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
