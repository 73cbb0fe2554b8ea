"""Time evaluations and training steps of the published networks.

python benchmarks/network.py [key=value ...]

Random weights, synthetic images on the device, bf16. Needs a GPU. The ratio is to the authors' code on one H200, fp16.

  network   adm_64 | adm_256     published network (both)
  work      evaluate | train     (both)
  batch     images per batch     (evaluate: 64 and 256, 32 and 64; train: 256, 32 and 64)
  fused     true | false         fused kernels between convolutions, or plain torch (true)
  compile   true | false         compile the network with torch.compile (false; for fused=false)
  graphs    true | false         replay CUDA graphs in evaluations, as in sampling (true)
  search    true | false         cudnn.benchmark, as in our Trainers (true)
  profile   true | false         also print the device time in ms by kind of kernel (false)
  repeats   timed runs after three warm-up runs (7)
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hydra.utils import instantiate
from timing import environment, line, seconds, seconds_once
from torch.profiler import ProfilerActivity, profile

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.config import compose
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.models.gradients import replace_nonfinite
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.networks import Prompts, ops
from relay_diffusion.networks.flops import forward_flops, matrix_peak

EXPERIMENT = {"adm_64": "imagenet_64", "adm_256": "imagenet_256"}
# images/s of the authors' code on one H200, by batch
AUTHORS = {
    ("adm_64", "evaluate"): {64: 872.0, 256: 963.0},
    ("adm_256", "evaluate"): {32: 106.0, 64: 103.0},
    ("adm_64", "train"): {256: 369.0},
    ("adm_256", "train"): {32: 40.6, 64: None},  # the authors' code runs out of memory
}


@dataclass
class Options:
    """Options of this command; see above."""

    network: str = "adm_64,adm_256"
    work: str = "evaluate,train"
    batch: int = 0
    fused: bool = True
    compile: bool = False
    graphs: bool = True
    search: bool = True
    profile: bool = False
    repeats: int = 7


def build(experiment: str, *overrides: str) -> DiffusionStage:
    """Build the stage of an experiment with random non-zero weights on the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = compose("train", [f"experiment={experiment}", "trainer.precision=bf16-mixed", *overrides])
    with torch.device(device):
        stage: DiffusionStage = instantiate(cfg.stage)
    for parameter in stage.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return stage.to(device)


def evaluation(stage: DiffusionStage, batch: int, text: TextStates | None = None) -> Callable[[], None]:
    """Prepare one evaluation of the denoiser as in a sampler.

    text: a row for each image, on the device.
    """
    device = stage.device
    x = torch.randn(batch, 3, *stage.size, device=device)
    sigma, labels = torch.ones(batch), torch.zeros(batch, dtype=torch.long, device=device)
    prompts = None if text is None else Prompts(labels, text)
    if prompts is not None:
        labels = torch.arange(batch, device=device)  # rows of the prompts, as in DiffusionStage.draw
    denoise = stage.eval().guided_denoiser(prompts=prompts)

    def work() -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            denoise(x, sigma, labels)

    return work


def training_step(stage: DiffusionStage, batch: int, text: TextStates | None = None) -> Callable[[], None]:
    """Prepare a training step (gradient clean-up, Adam and EMA included) without Lightning.

    text: a row for each image, on the device.
    """
    device = stage.device
    images = torch.randint(0, 256, (batch, 3, *stage.size), dtype=torch.uint8, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    optimizer = stage.configure_optimizers()
    parameters = list(stage.denoiser.parameters())
    averages = [p.detach().clone() for p in parameters]
    stage.train()

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            x0 = to_float(images)
            sigma = stage.corruption.schedule.draw(batch, "cpu")
            noisy = stage.corruption.corrupt(x0, sigma, stage.corruption.draw_noise(x0, torch.randn_like))
            loss = stage.loss(stage.training_denoiser(noisy, sigma, labels, text=text), x0, sigma).mean()
        loss.backward()
        replace_nonfinite([p.grad for p in parameters if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1e-4)

    return work


WORK = {"evaluate": evaluation, "train": training_step}


KINDS = {  # kind of kernel: regular expression for names; the first match counts
    "normalization": "^(normalize|moments|coefficients|gradient_)",
    "sums of blocks": "^(add|sum_quads)$",
    "attention": "sdpa|flash|cudnn::fusion",
    "convolutions forward": "fprop",
    "gradients of weights": "wgrad",
    "gradients of inputs and enlarging": "dgrad",
    "matrix products": "nvjet|gemm",
    "Adam, EMA, gradients": "multi_tensor|^replace",
    "sums for biases": "reduce_kernel",
    "copies": "copy|Cat|Memset|Memcpy",
}


def kinds(work: Callable[[], None]) -> str:
    """Measure the device time in milliseconds by kind of kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    total: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA and "#" not in event.key:
            kind = next((kind for kind, name in KINDS.items() if re.search(name, event.key)), "other")
            total[kind] += event.self_device_time_total / 1e3
    return ", ".join(f"{kind} {ms:.1f}" for kind, ms in total.most_common())


def run(options: Options) -> None:
    """Print one row per network, work and batch size."""
    if not options.fused:
        ops.HAVE_TRITON = False
    print(environment())
    torch.backends.cudnn.benchmark = options.search
    peak = matrix_peak(torch.device("cuda"), torch.bfloat16)
    print(f"a matrix product of 8192^3 in bf16: {peak / 1e12:.0f} TFLOP/s, what shares are of")
    for network in options.network.split(","):
        for kind in options.work.split(","):
            stage = build(EXPERIMENT[network])
            stage.cuda_graphs = options.graphs
            each = forward_flops(stage.denoiser.network) * (3 if kind == "train" else 1)
            if options.compile:
                stage.denoiser.network.compile()
            for batch in [options.batch] if options.batch else AUTHORS[network, kind]:
                torch.cuda.reset_peak_memory_stats()
                name = f"{network} {kind}, batch {batch}"
                try:
                    work = WORK[kind](stage, batch)
                    first = seconds_once(work)
                    times = seconds(work, options.repeats)
                except torch.OutOfMemoryError:
                    print(f"{name:44} runs out of memory", flush=True)
                    break
                row = line(name, times, batch, AUTHORS[network, kind].get(batch))
                rate = each * batch / times[len(times) // 2]
                memory = torch.cuda.max_memory_allocated() / 2**30
                share = f"{rate / 1e12:.0f} TFLOP/s ({rate / peak:.0%})"
                if options.profile:
                    share += f"  {kinds(work)}"
                print(f"{row}  {share}  {memory:.1f} GiB  first {first:.1f} s", flush=True)
            del stage
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:] or ["repeats=7"], __doc__ or "", Options, run))
