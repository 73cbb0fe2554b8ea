"""What published networks were constructed with, in the settings of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from relay_diffusion.interop.pickles import PersistentObject

HEAD = 64  # channels of an attention head

# Constructors of the published classes: settings in order, with their defaults; ... is a setting without one.
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
    "eff_attn": False,  # the authors' faster attention: the same numbers
}
# Bounds of whole numbers, far beyond any network: a damaged file must not fill the memory.
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


def constructor_arguments(stored: PersistentObject, signature: Mapping[str, Any]) -> dict[str, Any]:
    """What `stored` was constructed with, by name; settings that the signature lacks included."""
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
    """Attention heads of the published block with so many channels: one for every 64, so maybe none."""
    if channels >= 2 * HEAD and channels % HEAD:
        raise ValueError(f"it has attention over {channels} channels, which is no multiple of {HEAD}")
    return channels // HEAD


def unet_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor settings of the published UNet -> those of ours."""
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
    levels = {resolution >> level: width * m for level, m in enumerate(mult)}  # pixels of a side -> channels
    attention = [size for size in values["attn_resolutions"] if size in levels and heads(levels[size]) > 0]
    heads(width * mult[-1])  # the lowest level has attention in any case
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
