"""Encoded captions on disk."""

import itertools

import pytest
import torch

from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.errors import UserError
from relay_diffusion.text import CachedEncoder, cache, check_encoder

NO_TOKENS = "\u200b"
CAPTIONS = ["a red fox", "traffic light", "", "a sleeping red fox in the light", "fox", "a red fox", NO_TOKENS]


class WordEncoder:
    """Encoder whose token states are word lengths, and which records the prompts that it gets."""

    dim, max_tokens, hash = 3, 6, "0123456789abcdef" * 4

    def __init__(self):
        self.encoded = []

    def truncated(self, prompts):
        return [prompt for prompt in prompts if len(prompt.split()) > self.max_tokens]

    def encode(self, prompts, note=True):
        assert not note  # one note for all captions
        self.encoded += prompts
        tokens, mask = torch.zeros(len(prompts), self.max_tokens, self.dim), torch.zeros(len(prompts), self.max_tokens)
        for row, prompt in enumerate(prompts):
            for column, word in enumerate(prompt.replace(NO_TOKENS, "").split()[: self.max_tokens]):
                tokens[row, column], mask[row, column] = len(word) + torch.arange(self.dim) / 8, 1
        return TextStates(tokens, mask.bool(), tokens.sum(1))


def prepared(folder, captions=CAPTIONS, encoder=None):
    cached = CachedEncoder(encoder or WordEncoder(), folder)
    cached.prepare(captions)
    return cached


def files(folder):
    return sorted(folder.rglob("*.*"))


def assert_right(cached, captions=CAPTIONS):
    states = cached.lookup(captions)
    expected = WordEncoder().encode(captions, note=False)
    assert states.tokens.dtype == states.pooled.dtype == torch.float16
    assert torch.equal(states.mask, expected.mask)
    assert torch.equal(states.tokens.float(), expected.tokens)
    assert torch.equal(states.pooled.float(), expected.pooled)


@pytest.mark.parametrize("sizes", [*itertools.product((1, 2, 100), repeat=2)])
def test_lookup_gives_what_the_encoder_gives(tmp_path, monkeypatch, sizes):
    for name, size in zip(("PER_FILE", "PER_CALL"), sizes, strict=True):
        monkeypatch.setattr(cache, name, size)
    cached = prepared(tmp_path)
    assert sorted(cached.encoder.encoded) == sorted({*CAPTIONS} - {""})
    assert_right(cached)
    assert_right(cached, CAPTIONS[::-1])
    assert_right(cached, [])
    assert (cached.dim, cached.max_tokens, cached.hash) == (3, 6, WordEncoder.hash)


def test_a_second_run_does_not_call_the_encoder(tmp_path, capsys):
    prepared(tmp_path)
    capsys.readouterr()
    again = prepared(tmp_path)
    assert again.encoder.encoded == []
    assert capsys.readouterr().out == ""
    assert_right(again)


def test_only_new_captions_are_encoded(tmp_path):
    prepared(tmp_path)
    more = prepared(tmp_path, [*CAPTIONS, "the fox"])
    assert more.encoder.encoded == ["the fox"]
    assert_right(more, [*CAPTIONS, "the fox"])
    assert len(files(tmp_path)) == 2


def test_each_encoder_has_its_files(tmp_path):
    prepared(tmp_path)
    other = WordEncoder()
    other.hash = "f" * 64
    assert len(prepared(tmp_path, encoder=other).encoder.encoded) == 5
    assert {path.parent.name for path in files(tmp_path)} == {"0123456789abcdef", "f" * 16}


def test_only_real_tokens_are_stored(tmp_path):
    prepared(tmp_path, [f"caption {number}" for number in range(1000)])
    (file,) = files(tmp_path)
    states = 1000 * (2 * 3 + 3) * 2  # two tokens and a pooled vector of three numbers
    assert states < file.stat().st_size < states + 1000 * (16 + 8) + 1000  # keys, ends, header


def test_a_caption_that_was_not_prepared(tmp_path):
    with pytest.raises(KeyError, match="caption that was not given to prepare: the fox"):
        prepared(tmp_path).lookup(["fox", "the fox"])


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut short":
        del content[-5:]
    elif how == "empty":
        content.clear()
    elif how == "a bit":
        content[-5] ^= 1
    elif how == "a huge header":
        content[:8] = (2**40).to_bytes(8, "little")
    elif how == "another encoder":
        start = content.index(b"0123456789abcdef")
        content[start : start + 4] = b"ffff"
    elif how == "no metadata":
        start = content.index(b"sha256")
        content[start : start + 6] = b"sha255"
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut short", "empty", "a bit", "a huge header", "another encoder", "no metadata"])
def test_a_damaged_file_is_computed_again(tmp_path, capsys, how):
    prepared(tmp_path)
    (file,) = files(tmp_path)
    before = file.read_bytes()
    damage(file, how)
    assert file.read_bytes() != before
    capsys.readouterr()
    cached = prepared(tmp_path)
    assert f"note: {file} is damaged (" in capsys.readouterr().out
    assert len(cached.encoder.encoded) == 5
    assert_right(cached)
    assert files(tmp_path) == [file]


@pytest.mark.parametrize("change", ["ends", "tokens", "pooled", "keys"])
def test_a_file_of_other_shapes_is_computed_again(tmp_path, change):
    """With a valid checksum: made by somebody, not by an accident."""
    cached = prepared(tmp_path)
    content = cached._opened(*files(tmp_path))
    changed = {
        "ends": content.ends * 100,
        "tokens": content.tokens[:, :2].contiguous(),
        "pooled": content.pooled.float(),
        "keys": content.keys[1:],
    }
    forged = content._replace(**{change: changed[change]})
    files(tmp_path)[0].unlink()
    cached._write(forged)
    assert len(prepared(tmp_path).encoder.encoded) == 5
    assert_right(prepared(tmp_path))


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PER_FILE", 2)
    monkeypatch.setattr(cache, "PER_CALL", 1)
    encoder = WordEncoder()
    encode = encoder.encode

    def interrupted(prompts, note):
        if len(encoder.encoded) == 3:
            raise KeyboardInterrupt
        return encode(prompts, note)

    encoder.encode = interrupted
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, encoder=encoder)
    assert len(prepared(tmp_path).encoder.encoded) == 3
    assert_right(prepared(tmp_path))


def test_progress_and_one_note(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache, "PER_CALL", 1)
    captions = ["a b c d e f g", "fox", "h i j k l m n o", "a", "the"]
    prepared(tmp_path, captions)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "note: 2 of 5 prompts have more than text.max_tokens=6 tokens and are truncated: "
        '"a b c d e f g", "h i j k l m n o"'
    )
    assert lines[-1] == "encoding captions: 5/5 captions"
    assert len([line for line in lines if line.startswith("note")]) == 1


def test_other_ranks_print_nothing(tmp_path, capsys):
    CachedEncoder(WordEncoder(), tmp_path).prepare(["a b c d e f g"], show_progress=False)
    assert capsys.readouterr().out == ""


def test_states_beyond_half_precision(tmp_path):
    encoder = WordEncoder()
    encode = encoder.encode

    def large(prompts, note):
        states = encode(prompts, note)
        return states._replace(tokens=states.tokens * 1e5)

    encoder.encode = large
    with pytest.raises(UserError, match=r"^text\.path: the states of this encoder exceed half precision"):
        prepared(tmp_path, encoder=encoder)
    assert files(tmp_path) == []


def test_captions_that_are_not_text(tmp_path):
    with pytest.raises(UserError, match=r"prompt 1 .* is of type int"):
        prepared(tmp_path, ["fox", 3])
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        prepared(tmp_path / "cache")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (tuple, "is tuple: must be TextStates"),
        (lambda states: states._replace(mask=states.mask.float()), r"float32 of shape \(1, 6\)"),
        (lambda states: TextStates(states.tokens[..., :2], states.mask, states.pooled[:, :2]), "2 channels; .* dim=3"),
        (lambda states: states.pad(7), "7 tokens; must have max_tokens=6"),
        (lambda states: states.select([0, 0]), "2 rows: must have 1"),
    ],
)
def test_states_that_do_not_fit_their_encoder(tmp_path, result, message):
    encoder, encode = WordEncoder(), WordEncoder().encode
    encoder.encode = lambda prompts, note: result(encode(prompts, note))
    with pytest.raises(UserError, match=rf"^text: WordEncoder\.encode: its result .*{message}"):
        prepared(tmp_path, ["a red fox"], encoder)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encode", lambda prompts: None, r"WordEncoder\.encode must take the arguments \(prompts, note=\): "),  # noqa: ARG005
        ("to", lambda: None, r"WordEncoder\.to must take the arguments \(device\): too many"),
        ("unload", None, "WordEncoder has no unload; a text encoder needs dim, max_tokens, "),
        ("dim", 0, r"WordEncoder\.dim=0: must be a whole number"),
        ("max_tokens", "8", r"WordEncoder\.max_tokens=8: must be a whole number"),
        ("hash", "../other", r"WordEncoder\.hash=\.\./other: must be a SHA-256"),
    ],
)
def test_an_encoder_without_the_interface_is_refused(name, value, message):
    encoder = WordEncoder()
    encoder.to = encoder.unload = lambda *_: encoder
    check_encoder(encoder)
    setattr(encoder, name, value)
    with pytest.raises(UserError, match=f"^text: {message}"):
        check_encoder(encoder)
