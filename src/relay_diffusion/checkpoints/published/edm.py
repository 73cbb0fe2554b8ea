"""Networks of published checkpoints and the conversion of their parameters.

| published                     | ours                                | change                                      |
| ----------------------------- | ----------------------------------- | ------------------------------------------- |
| model.map_augment             | embed_augment                       |                                             |
| model.map_layer0 / map_layer1 | embed0 / embed1                     |                                             |
| model.map_label [E,K]         | embed_class [K,E]                   | transposed: a table instead of a product    |
| model.enc.RxR_conv            | conv_in                             |                                             |
| model.enc.RxR_down, _blockN   | encoder.I                           | numbered in order                           |
| model.dec.RxR_in0, _in1       | middle.0, middle.1                  |                                             |
| model.dec.RxR_up, _blockN     | decoder.I                           | numbered in order                           |
| ... .norm2, .qkv, .proj       | ... .attention.norm, .qkv, .proj    | qkv rows from (head, channel, qkv) order to |
|                               |                                     | (qkv, head, channel)                        |
| model.out_norm, out_conv      | norm_out, conv_out                  |                                             |

The buffers `resample_filter` are omitted, because resampling is constant here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from relay_diffusion.checkpoints.published.unpickle import StoredObject, StoredTensor, open_checkpoint
from relay_diffusion.errors import UserError
from relay_diffusion.networks import EDMPreconditioner, UNet
from relay_diffusion.networks.layers import ResidualBlock, SelfAttention

_EMBEDDINGS = {
    "embed_augment": "map_augment",
    "embed0": "map_layer0",
    "embed1": "map_layer1",
    "embed_class": "map_label",
    "norm_out": "out_norm",
    "conv_out": "out_conv",
}
_BOX = torch.full((1, 1, 2, 2), 0.25)  # the published resampling filter, the mean of 2x2 pixels
_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj": "proj"}


def _block_names(network: UNet) -> dict[str, str]:
    """Map our block names to the published ones, e.g. encoder.3 -> enc.32x32_block1."""
    names, resolution, count = {}, network.size[0], 0
    for i, block in enumerate(network.encoder):
        assert isinstance(block, ResidualBlock)
        resolution, count = (resolution // 2, 0) if block.down else (resolution, count)
        names[f"encoder.{i}"] = f"enc.{resolution}x{resolution}_" + ("down" if block.down else f"block{count}")
        count += not block.down
    names |= {f"middle.{i}": f"dec.{resolution}x{resolution}_in{i}" for i in range(2)}
    count = 0
    for i, block in enumerate(network.decoder):
        assert isinstance(block, ResidualBlock)
        resolution, count = (resolution * 2, 0) if block.up else (resolution, count)
        names[f"decoder.{i}"] = f"dec.{resolution}x{resolution}_" + ("up" if block.up else f"block{count}")
        count += not block.up
    return names


def published_names(network: UNet) -> dict[str, str]:
    """Map our parameter names to the published ones."""
    blocks = _block_names(network)
    first = f"enc.{network.size[0]}x{network.size[1]}_conv"
    names = {}
    for ours, _ in network.named_parameters():
        module, _, parameter = ours.rpartition(".")
        parts = module.split(".")
        if parts[0] == "conv_in":
            published = first
        elif parts[0] in _EMBEDDINGS:
            published = _EMBEDDINGS[parts[0]]
        else:
            layer = _ATTENTION[parts[3]] if parts[2] == "attention" else parts[2]
            published = f"{blocks['.'.join(parts[:2])]}.{layer}"
        names[ours] = f"model.{published}.{parameter}"
    return names


def convert_weights(state: Mapping[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """Convert published parameters to the state dict of `network`.

    Raises KeyError naming a missing parameter.
    """
    converted = {ours: state[published] for ours, published in published_names(network).items()}
    if network.embed_class is not None:
        converted["embed_class.weight"] = converted["embed_class.weight"].mT.contiguous()
    for name, module in network.named_modules():
        if isinstance(module, SelfAttention):
            for parameter in ("weight", "bias"):
                key = f"{name}.qkv.{parameter}"
                converted[key] = rearrange(
                    converted[key], "(heads c n) ... -> (n heads c) ...", heads=module.heads, n=3
                )
    return converted


def _idle_attention(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameters of an attention that adds nothing.

    Our UNet always has attention at its lowest level; a narrow published network has none.
    """
    levels = len(settings["channel_mult"])
    size, channels = settings["resolution"] >> (levels - 1), settings["channels"] * settings["channel_mult"][-1]
    if heads(channels) > 0:
        return {}
    name = f"model.dec.{size}x{size}_in0"
    return {
        f"{name}.norm2.weight": torch.ones(channels),
        f"{name}.norm2.bias": torch.zeros(channels),
        f"{name}.qkv.weight": torch.zeros(3 * channels, channels, 1, 1),
        f"{name}.qkv.bias": torch.zeros(3 * channels),
        f"{name}.proj.weight": torch.zeros(channels, channels, 1, 1),
        f"{name}.proj.bias": torch.zeros(channels),
    }


def _check_class(stored: Any, wanted: str, path: Path) -> None:
    if not isinstance(stored, StoredObject):
        raise ValueError(f"a {type(stored).__name__} where a network is expected")
    if stored.class_name != wanted:
        name = ascii(stored.class_name)[1:-1][:60]
        raise UserError(f"{path} holds a {name}, which is not supported: give an EDMPrecond with a DhariwalUNet")


def _parameters(module: StoredObject, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Collect the parameters under `module` by their published names.

    Raises ValueError for a buffer other than the resampling filter of our UNet.
    """
    if id(module) in seen:
        raise ValueError(f"{prefix} is the same module as another")
    seen.add(id(module))
    parameters, buffers, children = (module.state[kind] for kind in ("_parameters", "_buffers", "_modules"))
    if not all(isinstance(name, str) and name.isprintable() for name in [*parameters, *buffers, *children]):
        raise ValueError(f"{prefix} has parts without a name")
    for name, value in parameters.items():
        if value is not None and not isinstance(value, StoredTensor):
            raise ValueError(f"{prefix}{name} is no tensor")
        if value is not None:
            yield f"{prefix}{name}", value.read()
    for name, value in buffers.items():
        if value is not None and not (name == "resample_filter" and _is_box(value)):
            raise ValueError(f"{prefix}{name} is no mean of 2x2 pixels, which this project's network resamples with")
    for name, child in children.items():
        if child is not None and not isinstance(child, StoredObject):
            raise ValueError(f"{prefix}{name} is no module")
        if child is not None:
            yield from _parameters(child, f"{prefix}{name}.", seen)


def _is_box(value: Any) -> bool:
    """Whether a stored buffer is the mean of 2x2 pixels."""
    return isinstance(value, StoredTensor) and torch.equal((found := value.read()), _BOX.to(found.dtype))


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


@dataclass(frozen=True)
class PublishedCheckpoint:
    """Settings and EMA weights of a published file.

    `settings`: constructor settings of our UNet. `weights`: by published name. `loss`: the stored loss object, if any.
    `label_dropout`: probability that training hid a label.
    """

    path: Path
    settings: dict[str, Any]
    sigma_data: float
    weights: dict[str, Tensor]
    loss: StoredObject | None
    label_dropout: float = 0.0

    def denoiser(self) -> EDMPreconditioner:
        """Build the network with its weights, in eval mode."""
        network = UNet(**self.settings)
        network.load_state_dict(convert_weights(self.weights, network))
        return EDMPreconditioner(network, self.sigma_data).eval()

    def check(self) -> None:
        """Check that the weights fit the network and are finite.

        The network is on the meta device. Raises UserError naming the first wrong parameter.
        """
        try:
            with torch.device("meta"):
                network = UNet(**self.settings)
        except (ValueError, RuntimeError, ArithmeticError) as error:
            detail = str(error).splitlines()[0]
            raise UserError(f"{self.path} describes a network that cannot be built: {detail}") from None
        shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        expected = {published: shapes[ours] for ours, published in published_names(network).items()}
        if network.embed_class is not None:
            expected["model.map_label.weight"] = expected["model.map_label.weight"][::-1]
        stored = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        if wrong := [f"lacks {name}" for name in expected if name not in stored]:
            raise UserError(f"{self.path} {wrong[0]}{_more(wrong)}: not the network that it describes; fetch it again")
        if wrong := [f"also holds {name}" for name in stored if name not in expected]:
            raise UserError(f"{self.path} {wrong[0]}{_more(wrong)}: not the network that it describes; fetch it again")
        if wrong := [name for name in expected if stored[name] != expected[name]]:
            raise UserError(
                f"{self.path} holds {wrong[0]} of shape {list(stored[wrong[0]])}, but describes a network where it is "
                f"{list(expected[wrong[0]])}{_more(wrong)}: fetch it again"
            )
        if wrong := [name for name, tensor in self.weights.items() if not bool(tensor.isfinite().all())]:
            raise UserError(
                f"{self.path} holds weights that are not finite in {wrong[0]}{_more(wrong)}: fetch it again"
            )


def read_published(path: str | Path) -> PublishedCheckpoint:
    """Read a published checkpoint without running code in it.

    `path`: EDM's .pkl or the authors' .pt. Raises UserError naming the file.
    """
    path = Path(path)
    with open_checkpoint(path) as entries:
        if "stage_config" in entries:
            raise UserError(f"{path} is a checkpoint of this project, not a published one: use load_stage")
        if "ema" not in entries:
            held = ascii(", ".join(map(str, list(entries)[:3])))[1:-1][:120]
            raise UserError(f"{path} holds no 'ema' network, but {held or 'nothing'}: not a published checkpoint")
        checkpoint = _checkpoint(path, entries["ema"], entries.get("loss_fn"))
    checkpoint.check()
    return checkpoint


def _checkpoint(path: Path, ema: Any, loss: Any) -> PublishedCheckpoint:
    """Convert the settings and weights of the stored network `ema`."""
    try:
        _check_class(ema, "EDMPrecond", path)
        outer = constructor_arguments(ema, EDM_PRECOND)
        network = ema.state["_modules"]["model"]
        _check_class(network, "DhariwalUNet", path)
        arguments = constructor_arguments(network, DHARIWAL_UNET)
        settings, label_dropout = unet_settings(arguments), arguments["label_dropout"]
        sigma_data = outer["sigma_data"]
        if not (isinstance(sigma_data, int | float) and 0 < sigma_data < 1e3):
            raise ValueError("its sigma_data is not a number between 0 and 1000")
        if not (isinstance(label_dropout, int | float) and 0 <= label_dropout <= 1):
            raise ValueError("its label_dropout is not between 0 and 1")
        weights = _idle_attention(settings) | dict(_parameters(ema, "", set()))
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        detail = ascii(str(error))[1:-1][:120]
        raise UserError(f"{path}: unexpected checkpoint structure ({detail}); fetch it again") from None
    stored_loss = loss if isinstance(loss, StoredObject) else None
    return PublishedCheckpoint(path, settings, float(sigma_data), weights, stored_loss, float(label_dropout))


def load_published(path: str | Path) -> EDMPreconditioner:
    """Load the denoiser of a published checkpoint, in eval mode.

    It has the EMA weights. `path`: EDM's .pkl or the authors' .pt; no code in it runs. Raises UserError naming the
    file.
    """
    return read_published(path).denoiser()


HEAD = 64  # channels of an attention head

# Constructors of the published classes: settings in order, with their defaults; ... marks a required one.
EDM_PRECOND: dict[str, Any] = {
    "img_resolution": ...,
    "img_channels": ...,
    "label_dim": 0,
    "use_fp16": False,
    "sigma_min": 0,
    "sigma_max": math.inf,
    "sigma_data": 0.5,
    "model_type": "DhariwalUNet",
}  # and all those of the network
DHARIWAL_UNET: dict[str, Any] = {
    "img_resolution": ...,
    "in_channels": ...,
    "out_channels": ...,
    "label_dim": 0,
    "augment_dim": 0,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_emb": 4,
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "dropout": 0.10,
    "label_dropout": 0,
    "eff_attn": False,  # a faster attention with equal results
}
# Bounds far above any real network, so that a damaged file cannot exhaust the memory.
_WHOLE = {
    "img_resolution": (1, 2**14),
    "in_channels": (1, 2**10),
    "label_dim": (0, 2**20),
    "augment_dim": (0, 2**10),
    "model_channels": (1, 2**14),
    "channel_mult_emb": (1, 2**6),
    "num_blocks": (1, 2**6),
}
_WHOLE_LISTS = {"channel_mult": (1, 2**6), "attn_resolutions": (0, 2**14)}
_MAX_LEVELS = 15


def constructor_arguments(stored: StoredObject, signature: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments of `stored` by name, unknown ones included."""
    positional, named = stored.state["_init_args"], stored.state["_init_kwargs"]
    if len(positional) > len(signature):
        raise ValueError(f"{stored.class_name} was made with {len(positional)} settings")
    given = dict(zip(signature, positional, strict=False))
    if twice := given.keys() & named.keys():
        raise ValueError(f"{stored.class_name} was made with {min(twice)} given twice")
    arguments = {**signature, **given, **named}
    if missing := [name for name, value in arguments.items() if value is ...]:
        raise ValueError(f"{stored.class_name} was made without {missing[0]}")
    return arguments


def heads(channels: int) -> int:
    """Number of attention heads: one for every 64 channels, or none."""
    if channels >= 2 * HEAD and channels % HEAD:
        raise ValueError(f"it has attention over {channels} channels, which is no multiple of {HEAD}")
    return channels // HEAD


def unet_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Convert constructor settings of the published UNet to those of ours."""
    if unknown := arguments.keys() - DHARIWAL_UNET.keys():
        raise ValueError(f"its network has a setting {min(unknown)}, which is not known here")
    if arguments["in_channels"] != arguments["out_channels"]:
        raise ValueError("its network has other channels at its end than at its start")
    values = {name: [arguments[name]] for name in _WHOLE} | {name: list(arguments[name]) for name in _WHOLE_LISTS}
    for name, (low, high) in (_WHOLE | _WHOLE_LISTS).items():
        if len(values[name]) > _MAX_LEVELS or not all(type(v) is int and low <= v <= high for v in values[name]):
            raise ValueError(f"its network's {name} makes no sense")
    dropout = arguments["dropout"]
    if not (isinstance(dropout, int | float) and 0 <= dropout <= 1):
        raise ValueError("its network's dropout makes no sense")
    resolution, width, mult = arguments["img_resolution"], arguments["model_channels"], values["channel_mult"]
    levels = {resolution >> level: width * m for level, m in enumerate(mult)}  # resolution -> channels
    attention = [size for size in values["attn_resolutions"] if size in levels and heads(levels[size]) > 0]
    heads(width * mult[-1])  # the lowest level always has attention
    return {
        "resolution": resolution,
        "image_channels": arguments["in_channels"],
        "channels": width,
        "channel_mult": mult,
        "blocks": arguments["num_blocks"],
        "attention_resolutions": attention,
        "dropout": float(dropout),
        "num_classes": arguments["label_dim"],
        "augment_labels": arguments["augment_dim"],
        "embedding_mult": arguments["channel_mult_emb"],
    }
