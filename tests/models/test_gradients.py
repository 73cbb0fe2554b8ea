"""Non-finite gradients and the gradient norm."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from relay_diffusion.models.ema import WeightAverage
from relay_diffusion.models.gradients import GradientNorm, _is_dense, replace_nonfinite
from relay_diffusion.utils.quiet import quiet_libraries
from support import TRITON, tiny_stage

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_nonfinite_gradients_become_finite_and_are_counted():
    gradient = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), -2.0])
    count, norm = replace_nonfinite([gradient])
    assert count == 3
    assert gradient.tolist() == [1.0, 0.0, 1e5, -1e5, -2.0]
    assert norm == gradient.norm()


def test_the_nonfinite_kernel_equals_plain_torch(monkeypatch):
    """At the ends of programs and tensors, in any memory format; without a GPU in Triton's interpreter."""
    pytest.importorskip("triton", TRITON)
    from relay_diffusion.kernels import nonfinite

    monkeypatch.setattr(nonfinite, "BLOCK", 64)
    monkeypatch.setattr(nonfinite, "CHUNK", 128)
    nonfinite._work.cache_clear()
    tensors = [torch.randn(shape, device=DEVICE) for shape in ((300,), (1,), (128,), (4, 8, 3, 3))]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    tensors[0][[0, 127, 128, 299]] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan], device=DEVICE)
    tensors[1][0] = torch.inf
    tensors[2][5] = -1.8e19
    tensors[3][1, 2, 0, 1] = -torch.inf
    expected = [torch.nan_to_num(tensor, nan=0.0, posinf=1e5, neginf=-1e5) for tensor in tensors]
    assert nonfinite.replace_all(tensors, 1e5)[0] == 6
    for got, right in zip(tensors, expected, strict=True):
        assert torch.equal(got, right)
    assert nonfinite.replace_all(tensors, 1e5)[0] == 0
    tensors[0][2], tensors[2][5] = torch.nan, 5
    count, norm = nonfinite.replace_all(tensors, 1e5)
    assert count == 1
    assert float(norm) == pytest.approx(float(torch.cat([tensor.flatten() for tensor in tensors]).norm()), rel=1e-6)
    nonfinite._work.cache_clear()


def test_the_kernel_needs_dense_gradients():
    x = torch.randn(4, 8, 3, 3)
    assert _is_dense(x)
    assert _is_dense(x.to(memory_format=torch.channels_last))
    assert _is_dense(torch.randn(5))
    assert not _is_dense(x.double())
    assert not _is_dense(x[:, ::2])
    assert not _is_dense(torch.randn(4, 6).T)


def test_without_gradients_nothing_is_replaced():
    assert [int(value) for value in replace_nonfinite([])] == [0, 0]


def test_the_norm_is_over_all_gradients_and_the_mean_over_steps():
    norm = GradientNorm()
    assert norm.take() is None
    norm.add(torch.tensor(5.0))
    norm.add(torch.tensor(13.0))
    assert norm.take() == pytest.approx((5 + 13) / 2)
    assert norm.take() is None
    norm.add(torch.tensor(2e5), taken=torch.tensor(False))
    assert norm.take() is None
    norm.add(torch.tensor(2.0), taken=torch.tensor(True))
    norm.add(torch.tensor(1e5), taken=torch.tensor(False))
    assert norm.take() == pytest.approx(2)


@quiet_libraries()
def test_scaled_gradients_count_unscaled_and_steps_that_overflow_do_not(monkeypatch):
    """As with fp16 on a GPU, but in float32, so that both have the same gradients."""
    monkeypatch.setattr(MixedPrecision, "autocast_context_manager", lambda _: torch.autocast("cpu", enabled=False))
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    batches = [(images[:4], torch.zeros(4, dtype=torch.int64)), (images[4:], torch.ones(4, dtype=torch.int64))]

    def train(scale, first=0):
        torch.manual_seed(0)
        stage, plugins = tiny_stage(8), []
        stage.images_seen = 4 * first
        if scale is not None:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-116)
            plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        trainer = L.Trainer(
            max_steps=2 - first, accelerator="cpu", plugins=plugins, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(stage, DataLoader(batches[first:], batch_size=None))
        return stage.gradient_norm.take(), int(stage.replaced_gradients) > 0

    plain = train(None)
    assert train(2.0**10) == (pytest.approx(plain[0], rel=1e-5), False)
    second = train(None, first=1)[0]
    assert second != pytest.approx(plain[0], rel=0.1)
    assert train(2.0**126) == (pytest.approx(second, rel=1e-5), True)  # too much for the first step, then 2^10


def test_a_step_does_not_collect_the_weights_again(monkeypatch):
    """Collecting them at each use took a third of the time of a training step of the emoji's 64 network."""
    stage = tiny_stage(4)
    optimizer = stage.configure_optimizers()
    stage.trainer = SimpleNamespace(precision_plugin=None, world_size=1)
    stage.ema = WeightAverage(stage.denoiser, half_life_images=8)
    for weight in stage.denoiser.parameters():
        weight.grad = torch.full_like(weight, torch.inf)
    monkeypatch.setattr(torch.nn.Module, "named_parameters", None)
    stage.add_pending(4, torch.ones(4))
    stage.on_before_optimizer_step(optimizer)
    stage.configure_gradient_clipping(optimizer, 1.0, "norm")
    stage.optimizer_step(0, 0, SimpleNamespace(step=lambda **_: optimizer.step()))
    assert int(stage.replaced_gradients) > 0
    assert all(weight.grad is None for weight in stage._weights)
