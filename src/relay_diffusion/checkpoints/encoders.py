"""Build the text encoder of a trained stage."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from relay_diffusion.checkpoints.targets import OWN_PACKAGE, check_targets, package_names
from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import StageInfo
from relay_diffusion.text import TextEncoder, check_encoder
from relay_diffusion.utils.distributed import rank
from relay_diffusion.utils.messages import override, shorten

HASH_SHOWN = 12  # hexadecimal digits in messages


def load_text_encoder(
    info: StageInfo, path: str | None = None, trusted: Sequence[str] = (), option: str = "text.path"
) -> TextEncoder:
    """Build the text encoder with which a stage was trained.

    path: replaces the stored path of its files, for a copy in another place. trusted: as for load_stage. option: key of
    `path` in messages. A stored path is used if it is null (the installed MiniLM), or with a note if it is a local
    folder: a file from somebody else cannot cause a download. Its class must be a text encoder of a trusted package.
    Raises UserError if the stage has no text encoder, if its files are missing, and if they are those of another
    encoder than in training.
    """
    where = str(info.origin.get("file", "the stage"))
    if info.text is None:
        raise UserError(f"{where}: names no text encoder, so it was trained without text or with text of its own")
    stored: dict[str, Any] = info.text["encoder"]
    check_targets(stored, (OWN_PACKAGE, *package_names(trusted)), where)
    target = stored.get("_target_")
    if unknown := [name for name in stored if name.startswith("_") and name != "_target_"]:  # _args_ may hold a path
        raise UserError(f"{where} holds a text encoder with {shorten(unknown[0])}: refused")
    if target is None or not all(hasattr(get_class(target), name) for name in ("encode", "truncated")):
        raise UserError(f"{where} names {shorten(target)}, which is not a text encoder: refused")
    config = stored if path is None else {**stored, "path": path}
    named = {"option": option} if "option" in inspect.signature(get_class(target)).parameters else {}
    if path is None:
        _check_stored_path(stored.get("path"), where, option)
    try:
        encoder = cast(TextEncoder, instantiate(OmegaConf.create(config), _convert_="all", **named))
    except Exception as error:  # classes of trusted packages raise any type
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"the text encoder of {where} cannot be built: {reason}") from None
    check_encoder(encoder, f"the text encoder of {where}")
    check_same_encoder(info.text, describe_encoder(config, encoder), where)
    return encoder


def _check_stored_path(path: Any, where: str, option: str) -> None:
    """Require no path, or a local folder. A note shows it."""
    if path is None:
        return
    if not _is_folder(path):
        raise UserError(
            f"{where} was trained with the text encoder {shorten(path)}, which is no folder here: give "
            f"{override(option, shorten(path))} if you trust this name on the Hub, or the folder of a copy"
        )
    if rank() == 0:
        print(f"note: text encoder {shorten(path)} (named in {where})", flush=True)


def _is_folder(path: Any) -> bool:
    try:
        return Path(str(path)).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):  # too long; odd characters; no such user
        return False


def describe_encoder(config: Mapping[str, Any], encoder: TextEncoder) -> dict[str, Any]:
    """Return `text` of StageInfo for an encoder and its config."""
    return {"encoder": dict(config), "hash": encoder.hash}


def check_same_encoder(stored: Mapping[str, Any] | None, present: Mapping[str, Any] | None, where: str) -> None:
    """Require the text encoder of training; None: no text.

    stored, present: as in StageInfo. where: file of the stored one. Raises UserError naming both.
    """
    hashes = [None if text is None else text["hash"] for text in (stored, present)]
    if hashes[0] != hashes[1]:
        remedy = "use the files and the text.max_tokens of the first"
        if stored is None:
            remedy = f"use text=none, or init={where} to add text to its weights"
        raise UserError(
            f"{where} was trained with another text encoder: {_encoder_text(stored)} there, {_encoder_text(present)} "
            f"here; {remedy}"
        )


def _encoder_text(text: Mapping[str, Any] | None) -> str:
    """Describe a text encoder: its class, path, length and hash."""
    if text is None:
        return "none"
    settings = text["encoder"]
    options = [f"{key}={settings[key]}" for key in ("path", "max_tokens") if key in settings]
    name = str(settings.get("_target_")).rpartition(".")[2]
    return shorten(f"{name}({', '.join(options)}), hash {text['hash'][:HASH_SHOWN]}", 200)
