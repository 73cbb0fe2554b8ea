"""Validation of sampling arguments: seeds, class labels, start images."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relay_diffusion.diffusion.guidance import NO_CLASS
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.diffusion.text_states import TextStates, check_text
from relay_diffusion.errors import UserError
from relay_diffusion.text.base import check_prompts
from relay_diffusion.utils.messages import did_you_mean

MAX_SEED = 2**63 - 1
LARGEST_VALUE = 8.0  # samples exceed [-1, 1] a little; pixels in 0..255 exceed this limit

Integers = int | Sequence[int] | Tensor | np.ndarray
"""One integer, or a range, list, tuple, array or tensor of them."""

ClassLabels = Integers | str | Sequence[str]
"""Class indices, or class names: one, or a sequence of them."""


def seed_list(seeds: Integers) -> list[int]:
    """Convert seeds to a list.

    One integer, or a range, list, array or tensor [B]. Raises ValueError unless there is at least one and all lie in
    0..2^63-1.
    """
    found = _integers("seeds", seeds)
    found = [found] if isinstance(found, int) else found
    if not found:
        raise ValueError("seeds is empty: give at least one, each makes an image")
    if wrong := [seed for seed in found if not 0 <= seed <= MAX_SEED]:
        raise ValueError(f"seeds holds {wrong[0]}: a seed must lie between 0 and 2^63 - 1")
    return found


def label_tensor(
    labels: ClassLabels | None, count: int, num_classes: int, class_names: Sequence[str] = ()
) -> Tensor | None:
    """Convert class labels to a tensor [count] on the CPU.

    One class for all images, or one for each; None stays None. Raises ValueError for a wrong number or type of labels,
    UserError for classes that the network does not have.
    """
    if labels is None:
        return None
    found = _integers("labels", _class_indices(labels, class_names) if class_names else labels)
    found = [found] * count if isinstance(found, int) else found
    if len(found) != count:
        raise ValueError(f"labels holds {len(found)} for {count} seeds: give one for each, or one integer for all")
    if min(found) < NO_CLASS:
        raise ValueError(f"labels holds {min(found)}: use class indices from 0, or {NO_CLASS} for no class")
    if max(found) >= 0 and not num_classes:
        raise UserError("class was given, but the model has no classes: remove it (class=null)")
    if max(found) >= num_classes > 0:
        raise UserError(f"class {max(found)}: the model has classes 0..{num_classes - 1}")
    return torch.tensor(found)


def prompt_list(name: str, prompts: str | Sequence[str], count: int) -> list[str]:
    """Convert prompts to a list: one for all images, or one for each of `count`.

    Raises ValueError for another number, UserError for prompts that are not text.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    elif len(prompts) != count:
        raise ValueError(f"{name} holds {len(prompts)} for {count} seeds: give one for each, or one text for all")
    check_prompts(prompts, name)
    return list(prompts)


def check_takes_text(name: str, dim: int) -> None:
    """Raise UserError for a model without text.

    name: the argument in the message. dim: channels of the token states that the model takes, 0: it has no text.
    """
    if dim == 0:
        raise UserError(f"{name} was given, but the model was trained without text: remove it")


def text_rows(name: str, text: TextStates | None, count: int, dim: int) -> TextStates | None:
    """Return text with `count` rows, one for each image.

    One row is repeated for all images; None stays None. dim: as in `check_takes_text`. Raises ValueError for another
    type, shape or number of rows, UserError for a model of other text.
    """
    if text is None:
        return None
    check_takes_text(name, dim)
    check_text(name, text, 1 if isinstance(text, TextStates) and len(text.tokens) == 1 else count)
    found = text.tokens.shape[2]
    if found != dim:
        raise UserError(
            f"{name} has token states of {found} channels, the model takes {dim}: encode it with the text encoder of "
            "its training"
        )
    return text.select([0] * count) if len(text.tokens) == 1 else text


def image_batch(name: str, images: Tensor, shape: Sequence[int]) -> Tensor:
    """Convert images of `shape` [B,C,h,w] to floats in [-1, 1].

    uint8 is scaled, floats are kept. Raises ValueError naming the argument for another type, dtype or shape, and for
    values far outside [-1, 1].
    """
    if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name} is {kind}: must be a tensor of uint8, or of floats in [-1, 1]")
    if tuple(images.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(images.shape)}: must be {tuple(shape)}, [B,C,height,width]")
    if images.dtype == torch.uint8:
        return to_float(images)
    largest = float(images.abs().amax())
    if not largest <= LARGEST_VALUE:
        raise ValueError(
            f"{name} has values up to {largest:g}: floats must lie in [-1, 1]; give uint8, or pixels / 127.5 - 1"
        )
    return images


def _class_indices(labels: Any, class_names: Sequence[str]) -> Any:
    """Replace class names by their indices.

    Raises UserError for an unknown name.
    """
    if isinstance(labels, str):
        if labels not in class_names:
            raise UserError(f"labels={labels[:60]}: unknown class{did_you_mean(labels, class_names)}")
        return list(class_names).index(labels)
    if isinstance(labels, list | tuple):
        return [_class_indices(label, class_names) if isinstance(label, str) else label for label in labels]
    return labels


def _integers(name: str, values: Any) -> int | list[int]:
    """Convert one integer or a list of any usual type.

    Raises ValueError naming the argument.
    """
    given = values
    if isinstance(values, Tensor | np.ndarray):
        if values.ndim > 1:
            raise ValueError(f"{name} has shape {tuple(values.shape)}: must have one dimension")
        values = values.tolist()
    if isinstance(values, str | bytes):
        raise ValueError(f"{name} is the text {values[:60]!r}: must be integers, e.g. range(8) or [0, 5]")
    try:
        return [_integer(value) for value in values] if hasattr(values, "__iter__") else _integer(values)
    except TypeError as error:
        kind = getattr(given, "dtype", None) or type(given).__name__
        raise ValueError(f"{name} ({kind}): must be integers, e.g. range(8), [0, 5] or a tensor; {error}") from None


def _integer(value: Any) -> int:
    if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == torch.bool:
        raise TypeError("got a bool")
    return operator.index(value)
