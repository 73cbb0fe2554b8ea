"""Names of the published networks' parameters, and their conversion to ours.

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

Resampling filters (buffers `resample_filter`) are constants here and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from einops import rearrange
from torch import Tensor

from relay_diffusion.networks.blocks import ResidualBlock, SelfAttention
from relay_diffusion.networks.unet import UNet

_EMBEDDINGS = {
    "embed_augment": "map_augment",
    "embed0": "map_layer0",
    "embed1": "map_layer1",
    "embed_class": "map_label",
    "norm_out": "out_norm",
    "conv_out": "out_conv",
}
_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj": "proj"}


def _block_names(network: UNet) -> dict[str, str]:
    """Our block -> the published block, e.g. encoder.3 -> enc.32x32_block1."""
    names, resolution, count = {}, network.resolution, 0
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


def official_names(network: UNet) -> dict[str, str]:
    """Our parameter name -> the published name, for every parameter of `network`."""
    blocks = _block_names(network)
    first = f"enc.{network.resolution}x{network.resolution}_conv"
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


def from_official(state: Mapping[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """Published parameters -> the state dict of `network`. Raises KeyError naming a parameter that is missing."""
    converted = {ours: state[published] for ours, published in official_names(network).items()}
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
