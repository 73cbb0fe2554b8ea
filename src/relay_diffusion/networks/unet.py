"""UNet of every stage: ADM's architecture (Dhariwal & Nichol 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relay_diffusion.diffusion.text_states import TextStates, check_text, no_text
from relay_diffusion.networks.layers import ResidualBlock, SinusoidalEmbedding, group_norm, zero
from relay_diffusion.networks.ops import convolve_image, norm_act
from relay_diffusion.utils.messages import shorten
from relay_diffusion.utils.resolution import Resolution, image_size, resolution_of

MAX_LEVELS = 14


class UNet(nn.Module):
    """UNet conditioned on noise level, class, text, augmentation and an image.

    [B,C,H,W] -> [B,C,H,W] for any H and W divisible by `divisor`, 2^(levels - 1). `resolution`: that of training, R or
    [height, width]. `channels` x `channel_mult` are the channels of each level (each at half the resolution of the
    previous one); `blocks` residual blocks per level; attention at the lowest level and at those whose shorter side is
    in `attention_resolutions` in training. `num_classes` 0: unconditional. `augment_labels`: number of augmentation
    labels, 0 for none. `condition_channels`: channels that a condition adds to the input, 0 for none; its noise level
    has the same embedding as that of the image, but as sigma itself, not as ln(sigma)/4. `context_dim`: channels of the
    token states of text, 0: without text. Each block with self-attention then has cross-attention to the token states
    and a learned null token, which is all that an image without text has.
    `channels_last` keeps weights and activations in that memory format: same results, faster; on a GPU it enables the
    fused steps between convolutions. `checkpoint_levels`: levels (0: full resolution) with activation checkpointing:
    less memory, more time.
    Raises ValueError if the resolution is not divisible often enough, for a level that does not exist, and for
    dropout or channels out of range.
    """

    def __init__(
        self,
        resolution: Resolution,
        image_channels: int = 3,
        channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.0,
        num_classes: int = 0,
        augment_labels: int = 0,
        embedding_mult: int = 4,
        channels_last: bool = False,
        checkpoint_levels: Sequence[int] = (),
        condition_channels: int = 0,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        for name, value, low, high in (  # a damaged config must not exhaust time or memory
            ("image_channels", image_channels, 1, 1024),
            ("channels", channels, 2, 2**14),
            ("blocks", blocks, 1, 100),
            ("num_classes", num_classes, 0, 10**6),
            ("augment_labels", augment_labels, 0, 1024),
            ("condition_channels", condition_channels, 0, 1024),
            ("context_dim", context_dim, 0, 2**14),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name}={value}: must lie between {low} and {high:,}")
        levels = len(channel_mult)
        if not 1 <= levels <= MAX_LEVELS or not all(1 <= mult <= 64 for mult in channel_mult):
            raise ValueError(
                f"channel_mult={shorten(list(channel_mult))}: needs 1 to {MAX_LEVELS} levels of at most 64 times the "
                "channels"
            )
        self.divisor = 2 ** (levels - 1)
        self.size = image_size(resolution)
        if any(side % self.divisor for side in self.size):
            raise ValueError(
                f"resolution={resolution}: not divisible by 2^{levels - 1}, which {levels} levels of channel_mult "
                f"need; use {resolution_of([-(-side // self.divisor) * self.divisor for side in self.size])}"
            )
        if not set(checkpoint_levels) <= set(range(levels)):
            raise ValueError(f"checkpoint_levels={shorten(list(checkpoint_levels))}: the levels are 0 to {levels - 1}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
        if channels % 2:
            raise ValueError(f"channels={channels}: must be even")
        self.image_channels, self.num_classes = image_channels, num_classes
        self.augment_labels, self.condition_channels = augment_labels, condition_channels
        self.context_dim = context_dim
        width = channels * embedding_mult

        self._build_embeddings(channels, width)

        def block(level: int, in_channels: int, out_channels: int, attention: bool, **resample: bool) -> ResidualBlock:
            checkpointed, sizes = level in checkpoint_levels, (in_channels, out_channels, width)
            return ResidualBlock(*sizes, dropout, attention, checkpointed, **resample, context_dim=context_dim)

        self.conv_in = nn.Conv2d(image_channels + condition_channels, channels, 3, padding=1)
        self.encoder = nn.ModuleList()
        skips, current = [channels], channels
        for level, mult in enumerate(channel_mult):
            attention = min(self.size) >> level in attention_resolutions
            if level > 0:
                self.encoder.append(block(level, current, current, attention=False, down=True))
                skips.append(current)
            for _ in range(blocks):
                self.encoder.append(block(level, current, channels * mult, attention))
                current = channels * mult
                skips.append(current)

        self.middle = nn.ModuleList(block(levels - 1, current, current, attention) for attention in (True, False))

        self.decoder = nn.ModuleList()
        self.joins = []  # whether each decoder block has a skip connection
        for level, mult in reversed(list(enumerate(channel_mult))):
            attention = min(self.size) >> level in attention_resolutions
            if level < levels - 1:
                self.decoder.append(block(level, current, current, attention=False, up=True))
                self.joins.append(False)
            for _ in range(blocks + 1):
                self.decoder.append(block(level, current + skips.pop(), channels * mult, attention))
                self.joins.append(True)
                current = channels * mult
        self.norm_out = group_norm(current)
        self.conv_out = zero(nn.Conv2d(current, image_channels, 3, padding=1))
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._lay_out_weights()

    @property
    def resolution(self) -> int | list[int]:
        """Resolution of training, as in settings."""
        return resolution_of(self.size)

    def _build_embeddings(self, channels: int, width: int) -> None:
        self.embed_noise = SinusoidalEmbedding(channels)
        self.embed_augment = nn.Linear(self.augment_labels, channels, bias=False) if self.augment_labels else None
        self.embed_condition = nn.Linear(channels, channels, bias=False) if self.condition_channels else None
        self.embed0 = nn.Linear(channels, width)
        self.embed1 = nn.Linear(width, width)
        self.embed_class = nn.Embedding(self.num_classes, width) if self.num_classes else None
        self.embed_text = nn.Linear(self.context_dim, width, bias=False) if self.context_dim else None
        self.null_token = nn.Parameter(torch.randn(self.context_dim)) if self.context_dim else None

    def _lay_out_weights(self) -> None:
        """Convert weights to the memory format of the activations."""
        self.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):  # a matrix, with a contiguous gradient
                layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)

    def embed(
        self,
        noise: Tensor,
        labels: Tensor | None,
        augment: Tensor | None,
        condition_level: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """Compute the embedding [B,E] of the noise level and the conditions.

        noise [B], labels [B] (-1: no class), augment [B,A], condition_level [B], pooled [B,D] (0: no text); all but
        noise may be None.
        """
        embedding = self.embed_noise(noise)
        if self.embed_augment is not None and augment is not None:
            embedding = embedding + self.embed_augment(augment.to(embedding.dtype))
        if self.embed_condition is not None and condition_level is not None:
            embedding = embedding + self.embed_condition(self.embed_noise(condition_level))
        embedding = self.embed1(F.silu(self.embed0(embedding)))
        if self.embed_class is not None and labels is not None:
            known = (labels >= 0)[:, None].to(embedding.dtype)
            embedding = embedding + self.embed_class(labels.clamp(min=0)) * known
        if self.embed_text is not None and pooled is not None:
            # of unit variance, as the class embedding is, whatever the scale of the text encoder; 0 remains 0
            embedding = embedding + self.embed_text(F.rms_norm(pooled, pooled.shape[1:]))
        return F.silu(embedding)

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        condition_level: Tensor | None = None,
        text: TextStates | None = None,
    ) -> Tensor:
        """Apply the network: x [B,C,H,W] -> [B,C,H,W].

        noise: c_noise [B], labels [B] or None, augment_labels [B,A] or None.
        With K condition_channels x is [B,C+K,H,W], and condition_level [B] the noise level of the last K channels.
        text: B rows, or None, which is a row without text for each image.
        Raises ValueError unless `divisor` divides H and W, and for text that does not fit.
        """
        if any(side % self.divisor for side in x.shape[2:]):
            raise ValueError(f"x has shape {tuple(x.shape)}: height and width must be divisible by {self.divisor}")
        text = self._with_null_token(text, x)
        embedding = self.embed(noise, labels, augment_labels, condition_level, None if text is None else text.pooled)
        x = convolve_image(self.conv_in, x.contiguous(memory_format=self.memory_format))
        skips = [x]
        for block in self.encoder:
            x = block(x, embedding, None, text)
            skips.append(x)
        for block in self.middle:
            x = block(x, embedding, None, text)
        for block, joins in zip(self.decoder, self.joins, strict=True):
            x = block(x, embedding, skips.pop() if joins else None, text)
        out: Tensor = self.conv_out(norm_act(x, self.norm_out)[0])
        return out

    def _with_null_token(self, text: TextStates | None, x: Tensor) -> TextStates | None:
        """Prepend the null token to each row; None if context_dim=0."""
        if self.null_token is None:
            if text is not None:
                raise ValueError("text was given, but the network has none (context_dim=0): remove it")
            return None
        if text is None:
            text = no_text(len(x), self.context_dim, x.device)
        check_text("text", text, len(x))
        if text.tokens.shape[2] != self.context_dim:
            raise ValueError(f"text has token states of {text.tokens.shape[2]} channels: must be {self.context_dim}")
        null = self.null_token.expand(len(x), 1, -1)
        tokens = torch.cat([null, text.tokens.to(null.dtype)], dim=1)
        return TextStates(tokens, F.pad(text.mask, (1, 0), value=True), text.pooled.to(null.dtype))
