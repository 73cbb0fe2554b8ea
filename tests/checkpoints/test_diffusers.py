"""Published relays as pipelines of the library diffusers."""

import runpy
import sys
import warnings
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

import relay_diffusion as rd
from relay_diffusion.checkpoints.diffusers_layout import MODULE
from relay_diffusion.cli.publish import Format, PublishOptions, publish
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.data.image_sets import image_tensor
from relay_diffusion.errors import UserError
from relay_diffusion.models.relay import Relay
from relay_diffusion.sampling.run import sample
from support import assert_same_weights, tiny_stage
from text_relays import export_text_relay


@pytest.fixture(scope="module")
def diffusers():
    """The library, with the warnings of its import ignored; skip the test without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("diffusers")
        import_module(MODULE)
    library.utils.logging.set_verbosity_error()  # otherwise a note about accelerate
    library.utils.logging.disable_progress_bar()
    return library


@pytest.fixture(scope="module")
def folder(relay_folder, tmp_path_factory):
    """A published relay 8 -> 16 with two classes."""
    pytest.importorskip("huggingface_hub")
    return published(str(relay_folder), tmp_path_factory.mktemp("published") / "tiny")


@pytest.fixture(scope="module")
def pipeline(folder, diffusers):  # noqa: ARG001
    """The pipeline of that relay, built in Python."""
    return import_module(MODULE).RelayPipeline(rd.load_relay(folder))


@pytest.fixture
def load(diffusers, tmp_path, monkeypatch):
    """Load a folder as the documentation says, without network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(path, **options):
        given = {"custom_pipeline": str(path), "trust_remote_code": True} | options
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(path), **given)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return run


@pytest.fixture
def make(configuration, tmp_path):
    """Sample with sample.py's program; return the images, uint8 [B,H,W,C]."""

    def run(root, *overrides):
        stages = (f"relay.stages.{name}.path={root / name}" for name in ("base", "relay"))
        output = tmp_path / "made"
        cfg = configuration(
            "sample", "relay=two_stages", *stages, "trainer.accelerator=cpu", "picture=0", f"output={output}",
            *overrides,
        )  # fmt: skip
        validate_sampling(cfg)
        sample(cfg)
        return np.stack([np.asarray(Image.open(path)) for path in sorted((output / "images").rglob("*.png"))])

    return run


def published(source, destination, **options):
    publish(PublishOptions(source, str(destination), format=Format.diffusers, **options))
    return destination


def levels(images):
    """8-bit levels of PIL images, as integers."""
    return np.stack([np.asarray(image) for image in images]).astype(int)


def assert_within_one_level(images, expected):
    assert levels(images).shape == expected.shape
    assert levels(images).std() > 5  # they show something
    assert abs(levels(images) - expected).max() <= 1


def names(path):
    return sorted(each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file())


# ---- files ----


def test_published_files(folder, relay_folder, tmp_path):
    assert {"model_index.json", "pipeline.py", "relay.json"} < {*names(folder)}
    readme = (folder / "README.md").read_text()
    assert "- diffusers\n" in readme
    assert 'folder = "tiny"\npipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, ' in readme
    assert "pipe(class_labels=0, seeds=range(4))" in readme
    assert "diffusers runs `pipeline.py`" in readme
    plain = tmp_path / "plain"
    publish(PublishOptions(str(relay_folder), str(plain)))
    assert {*names(folder)} - {*names(plain)} == {"model_index.json", "pipeline.py"}
    assert "diffusers" not in (plain / "README.md").read_text()
    published(str(relay_folder), plain, overwrite=True)
    assert names(plain) == names(folder)
    publish(PublishOptions(str(relay_folder), str(plain), overwrite=True))
    assert "pipeline.py" not in names(plain)


def test_files_of_others_stay(relay_folder, tmp_path):
    pytest.importorskip("huggingface_hub")
    for name in ("pipeline.py", "model_index.json"):
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out" / name).write_text("precious")
        for overwrite in (False, True):
            with pytest.raises(UserError, match="also holds"):
                published(str(relay_folder), tmp_path / name / "out", overwrite=overwrite)
        assert (tmp_path / name / "out" / name).read_text() == "precious"


@pytest.mark.slow
@pytest.mark.usefixtures("login")
def test_a_repository(hub, relay_folder, load, tmp_path, monkeypatch):
    from huggingface_hub import snapshot_download

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which `load` sets
    published(str(relay_folder), "hf://user/tiny@v1")
    repository = hub.repositories["user/tiny"]
    files = repository.commits[repository.refs["v1"]]
    assert {"model_index.json", "pipeline.py"} < files.keys()
    assert 'folder = snapshot_download("user/tiny", revision="v1")' in files["README.md"].decode()
    downloaded = snapshot_download("user/tiny", revision="v1", cache_dir=tmp_path / "cache")
    assert_same_weights(load(downloaded).relay.state_dict(), rd.load_relay(relay_folder).state_dict())
    repository.commit({"pipeline.py": b"mine"}, "other")
    with pytest.raises(
        UserError, match=r"^destination=hf://user/tiny@other: has a pipeline\.py already; choose another"
    ):
        published(str(relay_folder), "hf://user/tiny@other")


def test_without_this_library(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(ImportError, match=r"^this pipeline needs the library .*: pip install -e '\.\[diff") as e:
        runpy.run_path(str(folder / "pipeline.py"))
    assert "\n" not in str(e.value)


# ---- images ----


@pytest.mark.slow
def test_it_makes_the_images_of_sample_py(folder, load, make, diffusers):
    pipe = load(folder)
    expected = make(folder, "seeds=[4,7]", "class=[0,1]")
    output = pipe(class_labels=["dark", 1], seeds=[4, 7])
    assert isinstance(output, diffusers.ImagePipelineOutput)
    assert_within_one_level(output.images, expected)
    (arrays,) = pipe(class_labels=[0, 1], seeds=[4, 7], output_type="np", return_dict=False)
    tensors = pipe(class_labels=torch.tensor([0, 1]), seeds=[4, 7], output_type="pt").images
    assert (arrays * 255).round().tolist() == levels(output.images).tolist()
    assert arrays.tolist() == tensors.permute(0, 2, 3, 1).tolist()


def test_seeds_and_generators(folder, load):
    pipe = load(folder)

    def draw(**options):
        return levels(pipe(class_labels=0, num_inference_steps=1, **options).images).tolist()

    expected = draw(seeds=range(5, 8))
    assert draw(seeds=5) == expected[:1]
    assert draw(generator=torch.Generator().manual_seed(5), num_images_per_prompt=3) == expected
    used = torch.Generator().manual_seed(5)
    torch.rand(3, generator=used)
    assert draw(generator=[torch.Generator().manual_seed(6), used]) == [expected[1], expected[0]]
    torch.manual_seed(0)
    random = draw()
    assert draw() != random
    torch.manual_seed(0)
    assert draw() == random
    both = pipe(class_labels=[0, 1], seeds=[5, 6, 5, 6], num_images_per_prompt=2, num_inference_steps=1).images
    assert levels(both[:2]).tolist() == expected[:2]
    assert levels(both[2:]).tolist() != expected[:2]


@pytest.mark.slow
def test_it_enlarges(folder, load, make, tmp_path):
    pipe = load(folder)
    small = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    (tmp_path / "small").mkdir()
    for index, pixels in enumerate(small):
        Image.fromarray(pixels).save(tmp_path / f"small/{index}.png")
    expected = make(folder, f"relay.start={tmp_path / 'small'}", "class=1")
    opened = [Image.fromarray(pixels) for pixels in small]
    images = pipe(image=opened, class_labels=1, seeds=[0, 1]).images
    assert_within_one_level(images, expected)
    for same in (
        small,
        small / 255,
        torch.from_numpy(small).permute(0, 3, 1, 2),
        list(torch.from_numpy(small / 255).movedim(3, 1)),
    ):
        assert levels(pipe(image=same, class_labels=1, seeds=[0, 1]).images).tolist() == levels(images).tolist()
    several = pipe(image=opened[0], class_labels=1, seeds=[0, 1]).images
    assert abs(levels(several[:1]) - levels(images[:1])).max() <= 1
    assert levels(several[1:]).tolist() != levels(images[:1]).tolist()
    assert pipe(image=opened[0].resize((12, 9)), num_inference_steps=4).images[0].size == (24, 18)


@pytest.mark.slow
def test_text(load, make, tmp_path):
    pytest.importorskip("transformers")
    from tiny_encoders import save_encoder

    root = export_text_relay(tmp_path / "text", save_encoder(tmp_path / "bert", "bert"))
    source = ",".join(f"{name}={root / name}" for name in ("base", "relay"))
    pipe = load(published(source, tmp_path / "out"))
    guided = ["relay.stages.base.changes.guidance_scale=2", "relay.stages.base.changes.sampler.steps=3"]
    expected = make(root, "seeds=[2,3]", "prompt=[a red fox,light]", "negative_prompt=traffic", *guided)
    options = {"seeds": [2, 3], "guidance_scale": 2.0, "num_inference_steps": 3, "negative_prompt": "traffic"}
    images = pipe(["a red fox", "light"], **options).images
    assert_within_one_level(images, expected)
    options |= {"guidance_scale": {"base": 2.0}, "num_inference_steps": {"base": 3}}
    assert levels(pipe(["a red fox", "light"], **options).images).tolist() == levels(images).tolist()
    with pytest.raises(UserError, match=r"^negative_prompt: needs classifier-free guidance"):
        pipe("a fox", negative_prompt="light", seeds=[1, 2])  # the scale of the last call is gone
    with pytest.raises(UserError, match=r"^negative_prompt=.*: must be one text"):
        pipe("a fox", negative_prompt=["light"], guidance_scale=2.0)


# ---- pipeline ----


def test_callbacks(folder, load):
    pipe, seen = load(folder), []

    def callback(given, step, sigma, tensors):
        assert given is pipe
        seen.append((step, sigma, tensors["stage"], tuple(tensors["latents"].shape)))
        return tensors

    pipe(class_labels=0, seeds=[1, 2], callback_on_step_end=callback, num_inference_steps=2)
    assert [step for step, *_ in seen] == list(range(len(seen)))
    stages = [stage for _, _, stage, _ in seen]
    assert stages == sorted(stages, key=["base", "relay"].index)
    assert len({*stages}) == 2
    assert seen[0][1:] == (80.0, "base", (2, 3, 8, 8))
    assert seen[-1][3] == (2, 3, 16, 16)
    wanted = []
    pipe(
        class_labels=0, callback_on_step_end=lambda *given: wanted.append([*given[3]]),
        callback_on_step_end_tensor_inputs=["estimates"],
    )  # fmt: skip
    assert wanted[0] == ["stage", "estimates"]
    with pytest.raises(UserError, match=r"^callback_on_step_end returns another latents: it cannot change"):
        pipe(class_labels=0, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})
    with pytest.raises(UserError, match=r"^callback_on_step_end_tensor_inputs: unknown noise; use latents, estimates"):
        pipe(class_labels=0, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["noise"])
    assert not pipe.relay.observers
    assert not pipe.relay.tile_observers


def test_the_progress_bar_reaches_its_end(folder, load, capsys):
    pipe = load(folder)
    pipe.set_progress_bar_config(disable=False)
    pipe(class_labels=0, seeds=[1, 2], num_inference_steps=2)
    assert "100%" in capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2]


def test_devices_and_dtypes(folder, load):
    pipe = load(folder, dtype=torch.float32)
    assert pipe.to("cpu") is pipe
    assert pipe.to(device="meta").device.type == "meta"
    assert {parameter.device.type for parameter in pipe.relay.parameters()} == {"meta"}
    for given in ({"dtype": torch.float16}, {"device": torch.bfloat16}, {"device": "cpu", "dtype": torch.float16}):
        with pytest.raises(UserError, match=r"^dtype=torch\.b?float16: a relay keeps float32 weights; remove it"):
            pipe.to(**given)
    with pytest.raises(UserError, match=r"^dtype=torch\.float16: a relay keeps float32 weights; remove it"):
        load(folder, dtype=torch.float16)
    with pytest.raises(UserError, match=r"^disable_mmap=True: relays do not support it; remove it"):
        load(folder, disable_mmap=True)
    with pytest.raises(UserError, match=r"^use_safetensors=False: a relay has no other weights"):
        load(folder, use_safetensors=False)
    with pytest.raises(UserError, match=r"^slice_size=auto: relays have no sliced attention"):
        pipe.enable_attention_slicing()
    with pytest.raises(UserError, match=r"^xformers: relays use the attention of torch"):
        pipe.enable_xformers_memory_efficient_attention()
    with pytest.raises((ValueError, ImportError)):
        pipe.enable_model_cpu_offload()


def test_saving(folder, load, tmp_path):
    pipe = load(folder)
    pipe.save_pretrained(tmp_path / "saved")
    assert names(tmp_path / "saved") == [name for name in names(folder) if name != "README.md"]
    again = load(tmp_path / "saved")
    assert_same_weights(again.relay.state_dict(), pipe.relay.state_dict())
    for options in (
        {"variant": "fp16"},
        {"safe_serialization": False},
        {"max_shard_size": "5GB"},
        {"push_to_hub": True},
    ):
        (name,) = options
        with pytest.raises(UserError, match=f"^{name}="):
            pipe.save_pretrained(tmp_path / "other", **options)
    pipe.relay.chain()["base"].guide = pipe.relay.chain()["base"].denoiser
    with pytest.raises(UserError, match=r"^save_pretrained: relay\.json cannot hold this relay's guide"):
        pipe.save_pretrained(tmp_path / "other")
    pipe.relay.rounding = "floor"
    with pytest.raises(UserError, match=r"^save_pretrained: relay\.json cannot hold this relay's rounding"):
        pipe.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_download_without_the_relay(folder, load, tmp_path):
    """What diffusers downloads by the name of a repository."""
    part = tmp_path / "part"
    part.mkdir()
    for name in ("model_index.json", "pipeline.py"):
        (part / name).write_text((folder / name).read_text())
    with pytest.raises(
        UserError, match=r'part has no relay\.json: .* huggingface_hub\.snapshot_download\("USER/NAME"\)'
    ):
        load(part)


def test_a_relay_that_was_built_in_python(folder, diffusers):  # noqa: ARG001
    pipeline = import_module(MODULE).RelayPipeline
    relay = rd.load_relay(folder / "relay" / "..", changes={"base": {"sampler": {"steps": 2}}})
    pipe = pipeline(relay)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(
        pipe(class_labels=1, seeds=3, output_type="pt").images * 255, relay.finish(relay.sample(3, 1)).float()
    )
    last = pipeline(rd.load_relay({"relay": folder / "relay"}))
    last.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match=r"^image: this relay enlarges images of 8x8 or others; give them"):
        last(seeds=1)
    assert last(image=Image.new("L", (8, 8)), seeds=1).images[0].size == (16, 16)
    first = pipeline(rd.load_relay({"base": folder / "base"}))
    with pytest.raises(UserError, match=r"^image: this relay has no stage that enlarges"):
        first(image=Image.new("RGB", (8, 8)))


def test_transparent_images_have_straight_colors(diffusers):  # noqa: ARG001
    relay = Relay({"relay": tiny_stage(16, 2, image_channels=4)})
    pipe = import_module(MODULE).RelayPipeline(relay)
    pipe.set_progress_bar_config(disable=True)
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 4)).astype(np.uint8)
    (expected,) = relay.to_pil(relay.sample(5, start=image_tensor(Image.fromarray(small))[None]))
    pixels = np.asarray(expected)
    assert (pixels[..., :3] > pixels[..., 3:]).any()
    for image in (Image.fromarray(small), small, torch.from_numpy(small).movedim(2, 0)):
        assert levels(pipe(image=image, seeds=5).images).tolist() == [pixels.tolist()]
    floats = pipe(image=small / 255, seeds=5).images  # whose products with alpha are not rounded
    assert abs(image_tensor(floats[0]).int() - image_tensor(expected).int()).max() <= 1
    (array,) = pipe(image=small, seeds=5, output_type="np").images
    (tensor,) = pipe(image=small, seeds=5, output_type="pt").images
    assert (array * 255).round().tolist() == pixels.tolist()
    assert torch.equal(tensor.movedim(0, 2), torch.from_numpy(array))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "latent"}, "^output_type=latent: use pil, pt, np$"),
        ({"prompt": "a fox"}, "^prompt was given, but the model was trained without text"),
        ({"class_labels": [0, 1], "image": ["a", "b", "c"]}, "^image is str: give PIL images"),
        ({"class_labels": [0, 1], "image": np.zeros((3, 8, 8, 3))}, "^class_labels holds 2 for 3 images; give as many"),
        ({"class_labels": []}, "^class_labels holds 0 for 1 images"),
        ({"class_labels": [0, 1], "seeds": [1, 2, 3]}, "^seeds holds 3 for 2 images: give one for each"),
        ({"class_labels": 2}, "^class 2: the model has classes 0..1"),
        ({"class_labels": "lihgt"}, "^labels=lihgt: unknown class; did you mean light"),
        ({"seeds": 1, "generator": torch.Generator()}, "^seeds and generator were given: remove one of them"),
        ({"generator": [3]}, "^generator holds a int: must be a torch.Generator; seeds takes integers"),
        ({"generator": 3}, "^generator holds a int: must be a torch.Generator; seeds takes integers"),
        ({"num_images_per_prompt": 0}, "^num_images_per_prompt=0: must be an integer of at least 1"),
        ({"guidance_scale": {"first": 2}}, "^guidance_scale: no stage first runs; available: base, relay"),
        ({"guidance_scale": "2"}, "^guidance_scale='2': must be a finite number"),
        ({"num_inference_steps": 0}, "^num_inference_steps=0: "),
        ({"num_inference_steps": 2.5}, "^num_inference_steps=2.5: must be an integer"),
        ({"image": np.full((8, 8, 3), 2.0)}, r"^image has values outside \[0, 1\]"),
        ({"image": np.zeros((8, 8, 1))}, r"^image has shape \(1, 1, 8, 8\): must have 3 channels"),
        (
            {"image": [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]},
            r"^image holds sizes 8x8, 9x8 \(width x height\): call",
        ),
        ({"image": []}, "^image is empty"),
    ],
)
def test_arguments_that_are_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message) as error:
        pipeline(**options)
    assert "\n" not in str(error.value)
