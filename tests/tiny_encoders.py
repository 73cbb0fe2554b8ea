"""Tiny encoders of three families with random weights, saved as folders of the transformers library."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "the", "red", "sleeping", "fox", "traffic", "light", "asleep", "in"]
DIM = 16
FAMILIES = ("bert", "t5", "clip")
SIZES = {"num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32, "hidden_size": DIM}


def _model(family):
    if family == "t5":
        config = transformers.T5Config(vocab_size=len(WORDS), d_model=DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        return transformers.T5ForConditionalGeneration(config)
    if family == "bert":
        config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=20, **SIZES)
        return transformers.BertModel(config)
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 20, "eos_token_id": 3, "bos_token_id": 2, **SIZES}
    vision = {"image_size": 8, "patch_size": 4, **SIZES}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def save_tokenizer(folder, words=WORDS):
    """Save a tokenizer of whole words, which puts [CLS] before a text and [SEP] after it."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_max_length=20
    ).save_pretrained(folder)


def save_encoder(folder, family, seed=0):
    """Save a tiny model and its tokenizer; return the folder. Large weights make the states of words differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _model(family)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    transformers.logging.enable_progress_bar()
    save_tokenizer(folder)
    return folder
