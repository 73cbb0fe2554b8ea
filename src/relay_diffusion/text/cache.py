"""Cache of encoded captions on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.errors import UserError
from relay_diffusion.text.base import TextEncoder, check_prompts, check_states, note_truncated
from relay_diffusion.utils.files import atomic_write, writing
from relay_diffusion.utils.messages import one_line, shorten
from relay_diffusion.utils.progress import progress

FORMAT = "1"
KEY_BYTES = 16  # of a caption's SHA-256
PER_FILE = 4096  # captions; an interrupted run loses at most so many
PER_CALL = 64  # captions given to the encoder at once


class _File(NamedTuple):
    """Encoded captions of one file.

    keys [N,16] uint8: hashes of the captions; ends [N]: last row + 1 of each in tokens [S,D]; pooled [N,D]. float16.
    """

    keys: Tensor
    ends: Tensor
    tokens: Tensor
    pooled: Tensor


class CachedEncoder:
    """Encoder that keeps the states of captions on disk, in half precision.

    cache: folder for all runs; each encoder has a folder in it, by its hash. Files hold the states of real tokens only,
    and are read by memory map. Call `prepare` with all captions before `lookup`; with several ranks, on one rank first:
    the others then read the cache. A changed set of captions encodes only what is new.
    """

    def __init__(self, encoder: TextEncoder, cache: str | Path = "outputs/text_cache") -> None:
        self.encoder = encoder
        self.folder = Path(cache).expanduser() / encoder.hash[:16]
        self._read_files: set[Path] = set()
        self._states: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}  # tokens [n,D] and pooled [D], memory-mapped

    @property
    def dim(self) -> int:
        """Width D of the states."""
        return self.encoder.dim

    @property
    def max_tokens(self) -> int:
        """Length T of encoded captions."""
        return self.encoder.max_tokens

    @property
    def hash(self) -> str:
        """SHA-256 of the encoder."""
        return self.encoder.hash

    def prepare(self, captions: Collection[str], show_progress: bool = True) -> None:
        """Encode the captions that are not in the cache.

        Damaged files are deleted and their captions encoded again. show_progress: also print notes. Raises UserError
        for captions that are not text, for a folder that cannot be written, and for states of other shapes or beyond
        half precision.
        """
        check_prompts(captions)
        self._read(show_progress)
        wanted = {caption for caption in captions if caption.strip()}
        # Captions of about the same length share batches.
        missing = sorted(
            (text for text in wanted if _key(text) not in self._states), key=lambda text: (len(text), text)
        )
        if not missing:
            return
        if show_progress:
            note_truncated(self.encoder, missing)
        with progress("encoding captions", len(missing), "captions", enabled=show_progress) as advance:
            for start in range(0, len(missing), PER_FILE):
                parts = []
                for part in _split(missing[start : start + PER_FILE], PER_CALL):
                    parts.append(self._encode(part))
                    advance(len(part))
                self._write(_joined(parts))
        self._read(show_progress)

    def lookup(self, prompts: Sequence[str]) -> TextStates:
        """Read encoded captions: float16 on the CPU, tokens [B,T,D], mask [B,T], pooled [B,D].

        Raises KeyError for a caption that was not given to `prepare`.
        """
        tokens = np.zeros((len(prompts), self.max_tokens, self.dim), np.float16)  # torch copies small parts more slowly
        mask = np.zeros((len(prompts), self.max_tokens), bool)
        pooled = np.zeros((len(prompts), self.dim), np.float16)
        for row, prompt in enumerate(prompts):
            if not prompt.strip():
                continue
            try:
                states, vector = self._states[_key(prompt)]
            except KeyError:
                raise KeyError(f"caption that was not given to prepare: {shorten(prompt)}") from None
            tokens[row, : len(states)] = states
            mask[row, : len(states)] = True
            pooled[row] = vector
        return TextStates(*map(torch.from_numpy, (tokens, mask, pooled)))

    def _encode(self, captions: Sequence[str]) -> _File:
        states = self.encoder.encode(captions, note=False)
        check_states(self.encoder, states, len(captions))
        tokens, pooled = states.tokens[states.mask].half().cpu(), states.pooled.half().cpu()
        if not (tokens.isfinite().all() and pooled.isfinite().all()):
            raise UserError("text.path: the states of this encoder exceed half precision; use another encoder")
        keys = torch.frombuffer(bytearray(b"".join(map(_key, captions))), dtype=torch.uint8).view(-1, KEY_BYTES)
        return _File(keys, states.mask.sum(1).cumsum(0).cpu(), tokens, pooled)

    def _write(self, content: _File) -> None:
        name = hashlib.sha256(content.keys.numpy().data).hexdigest()[:16]
        metadata = {"format": FORMAT, "encoder": self.hash, "sha256": _checksum(content)}
        with atomic_write(self.folder / f"{name}.safetensors") as file:
            file.write(save(content._asdict(), metadata))

    def _read(self, notes: bool) -> None:
        """Map the files that are not mapped yet; delete damaged ones."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._read_files:
                continue
            try:
                content = self._opened(path)
            except (ValueError, LookupError, OSError, SafetensorError) as error:
                if notes:
                    print(f"note: {path} is damaged ({one_line(error)}); its captions are encoded again", flush=True)
                with writing(path):
                    path.unlink(missing_ok=True)
                continue
            self._read_files.add(path)
            tokens = np.split(content.tokens.numpy(), content.ends[:-1].tolist())
            for key, states, vector in zip(content.keys.numpy(), tokens, content.pooled.numpy(), strict=True):
                self._states[bytes(key)] = states, vector

    def _opened(self, path: Path) -> _File:
        with safe_open(path, "pt") as opened:
            metadata: Mapping[str, str] = opened.metadata() or {}
            content = _File(*(opened.get_tensor(name) for name in _File._fields))
        if (metadata["format"], metadata["encoder"]) != (FORMAT, self.hash):
            raise ValueError("another format or encoder")
        count, rows = len(content.keys), len(content.tokens)
        expected = (
            ((count, KEY_BYTES), torch.uint8),
            ((count,), torch.int64),
            ((rows, self.dim), torch.float16),
            ((count, self.dim), torch.float16),
        )
        if any((tuple(part.shape), part.dtype) != each for part, each in zip(content, expected, strict=True)):
            raise ValueError("unexpected shapes")
        lengths = content.ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
        if count and (lengths.min() < 0 or lengths.max() > self.max_tokens or content.ends[-1] != rows):
            raise ValueError("impossible numbers of tokens")
        if metadata["sha256"] != _checksum(content):
            raise ValueError("wrong checksum")
        return content


def _key(caption: str) -> bytes:
    return hashlib.sha256(caption.encode()).digest()[:KEY_BYTES]


def _checksum(content: _File) -> str:
    checksum = hashlib.sha256()
    for part in content:
        checksum.update(part.numpy().data)
    return checksum.hexdigest()


def _split(captions: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (captions[start : start + size] for start in range(0, len(captions), size))


def _joined(parts: Sequence[_File]) -> _File:
    """Join encoded captions; ends count on."""
    ends, rows = [], 0
    for part in parts:
        ends.append(part.ends + rows)
        rows += len(part.tokens)
    return _File(*(torch.cat(column) for column in zip(*parts, strict=True)))._replace(ends=torch.cat(ends))
