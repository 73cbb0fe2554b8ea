"""Training with text: captions, encoder, callbacks, resume and initial weights."""

import shlex
import shutil

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from pictures_on_disk import encoded, pixels, write_zip
from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.config.train import validate_training
from relay_diffusion.data.datamodule import chosen_caption, evenly_spaced_captions
from relay_diffusion.data.dataset import ImageDataset, batch_of
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import DiffusionStage, StageInfo
from relay_diffusion.networks import EDMPreconditioner
from relay_diffusion.sampling.run import sample
from relay_diffusion.text import CachedEncoder, transformers_encoder
from relay_diffusion.training.run import sampling_command
from support import TINY, assert_same_weights, run, tiny_stage, weights_of
from tiny_encoders import DIM, save_encoder

NO_CLASSES = "network.num_classes=0"


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """Zip of 24 images with two captions, dark images in red and light images asleep; the last one has none."""
    pictures = {f"train/{n:02d}.png": encoded(pixels(n, 16) // 2 + 127 * (n % 2)) for n in range(24)}
    said = (["red", "a red fox"], ["asleep", "the traffic light"])
    captions = [[name, said[n % 2]] for n, name in enumerate(pictures) if n < 23]
    labels = [[name, n % 2] for n, name in enumerate(pictures)]
    pictures |= {f"heldout/{n}.png": encoded(pixels(n, 16)) for n in range(4)}
    captions += [[f"heldout/{n}.png", f"sleeping {'a ' * n}fox"] for n in range(3)]
    labels += [[f"heldout/{n}.png", 0] for n in range(4)]
    path = tmp_path_factory.mktemp("captioned") / "images.zip"
    return write_zip(path, pictures, {"labels": labels, "captions": captions})


@pytest.fixture
def fit_text(fit, archive, text_options):
    """Train a tiny stage with text."""

    def run(directory, images, *overrides, **settings):
        return fit(directory, images, *text_options, f"data.dataset.path={archive}", *overrides, **settings)

    return run


@pytest.fixture(scope="session")
def text_run(trained_run, archive, text_options):
    """Directory of a run of 8 images with text, which tests only read."""
    return trained_run(8, *text_options, f"data.dataset.path={archive}")


def batches(stage, count):
    """The first batches that a stage trains on."""
    stage.images_seen = 0
    loader = iter(stage.trainer.datamodule.train_dataloader())
    return [next(loader) for _ in range(count)]


def text_seen(monkeypatch):
    """Record the text of every call of `sample`."""
    seen, sample = [], DiffusionStage.sample

    def recorded(self, *arguments, text=None, **given):
        seen.append(text)
        return sample(self, *arguments, text=text, **given)

    monkeypatch.setattr(DiffusionStage, "sample", recorded)
    return seen


def assert_same_text(a, b):
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# ---- training ----


@pytest.mark.slow
def test_training_learns_what_the_captions_say(fit_text):
    """The images are dark or light; at high noise levels only the text tells which."""
    noisier = ("stage.corruption.schedule.p_mean=2", "stage.corruption.schedule.p_std=0.5")
    quick = (
        NO_CLASSES,
        "stage.optimizer.lr=3e-3",
        "callbacks.ema.half_life_images=50",
        "data.batch_size=8",
        "resolution=8",
    )
    trained = fit_text("run", 400, *quick, *noisier, "stage.label_dropout=0.1").eval()
    data = trained.trainer.datamodule
    images, labels = batch_of(data.dataset, range(23))
    x0, sigma = to_float(images), torch.full((23,), 15.0)
    noisy = x0 + 15 * torch.randn_like(x0)

    def loss(prompts):
        text = None if prompts is None else data.text.lookup(prompts)
        with torch.no_grad():
            return trained.loss(trained.denoiser(noisy, sigma, text=text), x0, sigma).mean().item()

    for said in (("red", "asleep"), ("a red fox", "the traffic light")):
        right, wrong = (loss([said[label ^ other] for label in labels]) for other in (0, 1))
        assert right < 0.8 * loss(None)
        assert loss(None) < wrong


def test_batches_have_encoded_captions(fit_text, archive):
    trained = fit_text("run", 4)
    data = trained.trainer.datamodule
    first, second = batches(trained, 2)
    assert isinstance(first[2], TextStates)
    assert first[2].tokens.shape == second[2].tokens.shape == (4, 10, DIM)  # of fixed length, for CUDA graphs
    assert first[2].tokens.dtype == torch.float16
    order = data.train_dataloader().sampler.order.stream(0, 8)
    captions = ImageDataset(archive, 16, "train").captions
    chosen = [chosen_caption(captions[index % 24], 0, position) for position, index in enumerate(order)]
    assert len({*chosen}) > 2
    for number, batch in enumerate((first, second)):
        assert_same_text(batch[2], data.text.lookup(chosen[4 * number : 4 * number + 4]))


def test_worker_processes_look_up_the_text(fit_text):
    alone, many = fit_text("alone", 8), fit_text("many", 8, "data.num_workers=2")
    assert_same_weights(alone.state_dict(), many.state_dict())


def test_the_width_of_the_network_is_that_of_the_encoder(fit_text, tmp_path, capsys):
    assert fit_text("run", 4, NO_CLASSES).text_dim == DIM
    printed = capsys.readouterr().out
    assert printed.count("note: 1 images have no caption; their prompt is empty\n") == 1
    assert load_stage(tmp_path / "run").text_dim == DIM
    given = fit_text("given", 4, NO_CLASSES, f"network.context_dim={DIM}")
    assert_same_weights(given.state_dict(), weights_of_run(tmp_path / "run"))


def weights_of_run(directory):
    return torch.load(directory / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_captions_are_encoded_once(fit_text, tmp_path, monkeypatch, capsys):
    cache = f"data.text_cache={tmp_path / 'cache'}"
    first = fit_text("first", 4, cache)
    assert "encoding captions: 4/4 captions" in capsys.readouterr().out
    assert "_model" not in vars(first.trainer.datamodule.text.encoder)  # its weights are not in memory

    def fail(*_):
        raise AssertionError("the weights of the encoder were loaded")

    monkeypatch.setattr(transformers_encoder, "_load_model", fail)
    assert_same_weights(fit_text("second", 4, cache).state_dict(), first.state_dict())


def test_text_keeps_label_dropout_and_guidance_without_classes(fit_text):
    inferred = ("data.dataset.labels=false", "network.num_classes=null")
    trained = fit_text("run", 4, *inferred, "stage.label_dropout=0.1", "stage.guidance_scale=2")
    assert (trained.num_classes, trained.label_dropout, trained.guidance_scale) == (0, 0.1, 2)


@pytest.mark.slow
def test_two_processes_train_as_one(fit_text, archive, text_options, tmp_path, capsys):
    same = [f"data.dataset.path={archive}", "stage.label_dropout=0.1", f"data.text_cache={tmp_path / 'cache'}"]
    two = [*TINY, *text_options, *same, "resolution=16", "strategy=ddp_cpu", f"run_dir={tmp_path / 'two'}"]
    result = run("train.py", *two, "trainer.max_images=16")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("encoding captions: 4/4 captions") == 1
    fit_text("one", 16, *same, "trainer.accumulate_grad_batches=2")
    assert "encoding captions" not in capsys.readouterr().out
    one, two = (weights_of(tmp_path / name / "checkpoints/last.ckpt") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6, msg=name)


# ---- pictures and measurements ----


@pytest.mark.parametrize("stage", ["base", "relay"])
def test_sample_grids_have_the_captions_of_the_data(fit_text, tmp_path, monkeypatch, stage):
    seen = text_seen(monkeypatch)
    often = ("callbacks.grid.every_n_images=4", "callbacks.grid.count=3", "stage.label_dropout=0.1")
    block = ["stage.corruption.block=2"] if stage == "relay" else []
    trained = fit_text("run", 8, *often, *block, "stage.guidance_scale=2", stage=stage)
    assert len(list((tmp_path / "run/samples").glob("*.png"))) == len(seen) == 2
    data = trained.trainer.datamodule
    prompts = evenly_spaced_captions(data.dataset, range(3), 3)
    assert all(prompt in data.dataset.captions[number] for prompt, number in zip(prompts, (0, 8, 16), strict=True))
    assert (tmp_path / "run/samples/prompts.txt").read_text().splitlines() == prompts
    for text in seen:
        assert_same_text(text, data.text.lookup(prompts))


@pytest.mark.slow
def test_evaluation_has_the_captions_of_the_data(fit_text, tmp_path, monkeypatch):
    seen = text_seen(monkeypatch)
    fit_text(
        "run", 4, "callbacks=evaluated", "callbacks.evaluation.count=6", "callbacks.evaluation.batch_size=4",
        f"callbacks.evaluation.evaluator.reference.cache={tmp_path / 'reference'}",
        "callbacks.evaluation.evaluator.inception._target_=pixel_inception.pixels",
    )  # fmt: skip
    assert [len(text.tokens) for text in seen] == [4, 2]
    assert all(text.mask.any() for text in seen)


def test_validation_has_the_captions_of_its_images(fit_text, monkeypatch):
    seen, forward = [], EDMPreconditioner.forward

    def recorded(self, x, *arguments):
        seen.append(None if self.training else arguments[-1])
        return forward(self, x, *arguments)

    monkeypatch.setattr(EDMPreconditioner, "forward", recorded)
    small = ("callbacks.validation.batch_size=8", "callbacks.validation.bins=2")
    trained = fit_text("run", 4, "callbacks=validation", *small)
    (text,) = filter(None, seen)
    prompts = ["sleeping fox", "sleeping a fox", "sleeping a a fox", ""]
    assert_same_text(text, trained.trainer.datamodule.text.lookup([prompt for prompt in prompts for _ in range(2)]))


# ---- resume and initial weights ----


@pytest.mark.slow
def test_a_resumed_run_equals_one_without_interruption(fit_text, tmp_path):
    """To the last bit, with the captions encoded again."""
    hard = ("stage.label_dropout=0.3", "network.dropout=0.1", "data.batch_size=8")
    fit_text("whole", 32, *hard)
    for images in (16, 32):
        fit_text("parts", images, *hard, f"data.text_cache={tmp_path / str(images)}")
    whole, parts = (weights_of(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "parts"))
    assert_same_weights(whole, parts)


@pytest.fixture
def other_text(tmp_path):
    """Overrides for another text encoder of the same width."""
    return f"text.path={save_encoder(tmp_path / 'other', 'bert', seed=1)}"


def test_resume_with_another_encoder_is_an_error(
    fit_text, fit, trained, archive, tmp_path, text_options, other_text, capsys
):
    images = f"data.dataset.path={archive}"
    trained("run", 8, *text_options, images)
    shutil.copytree(text_options[1].partition("=")[2], tmp_path / "copy")
    fit_text("run", 12, f"text.path={tmp_path / 'copy'}")
    assert "run: continues " in (printed := capsys.readouterr().out)
    assert " with " not in printed
    message = r"last\.ckpt was trained with another text encoder: TransformersEncoder\(path=.*, max_tokens=10\), hash "
    for other in (other_text, "text.max_tokens=9"):
        with pytest.raises(UserError, match=message + r".* there, TransformersEncoder.* here; use the files"):
            fit_text("run", 16, other)
    with pytest.raises(UserError, match=r"was trained with another text encoder: .* there, none here; use the files"):
        fit("run", 16, images)
    trained("plain", 4, images)
    with pytest.raises(
        UserError, match=r": none there, Transformers.* here; use text=none, or init=.*last\.ckpt to add"
    ):
        fit_text("plain", 12)


def text_weights(stage):
    return {name: weight for name, weight in stage.state_dict().items() if "text" in name or "cross" in name}


def test_initial_weights_of_a_network_without_text(fit, fit_text, archive, tmp_path, capsys):
    plain = fit("plain", 8, f"data.dataset.path={archive}")
    capsys.readouterr()
    still = ("stage.optimizer.lr=0", f"init={tmp_path / 'plain'}")
    with_text = fit_text("text", 4, *still)
    assert "plain/checkpoints/last.ckpt, but new text layers (no text there), " in capsys.readouterr().out
    fresh = fit_text("fresh", 4, "stage.optimizer.lr=0")
    assert_same_weights(text_weights(with_text), text_weights(fresh))
    averaged = load_stage(tmp_path / "plain").state_dict()
    assert_same_weights({name: with_text.state_dict()[name] for name in averaged}, averaged)
    assert plain.text_dim == 0


def test_initial_weights_of_a_network_with_text(fit, fit_text, archive, text_run, other_text, capsys):
    before, still = load_stage(text_run), ("stage.optimizer.lr=0", f"init={text_run}")
    capsys.readouterr()
    assert_same_weights(fit_text("same", 4, *still).state_dict(), before.state_dict())
    assert ", but " not in capsys.readouterr().out
    changed = fit_text("changed", 4, *still, other_text)
    assert "last.ckpt, but new text layers (another text encoder there), " in capsys.readouterr().out
    fresh = fit_text("fresh", 4, "stage.optimizer.lr=0", other_text)
    assert_same_weights(text_weights(changed), text_weights(fresh))
    plain = fit("plain", 4, *still, f"data.dataset.path={archive}")
    assert "last.ckpt, but without its text layers, " in capsys.readouterr().out
    assert_same_weights(plain.state_dict(), {name: before.state_dict()[name] for name in plain.state_dict()})


def test_settings_of_text_are_no_change_for_older_runs(fit, trained, tmp_path, capsys):
    trained("run", 4)
    path = tmp_path / "run/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    config = content["run"]["config"]
    for part, name in ((config, "text"), (config["network"], "context_dim"), (config["data"], "text_cache")):
        del part[name]
    torch.save(content, path)
    fit("run", 8)
    assert "last.ckpt, " in capsys.readouterr().out  # not "last.ckpt with ..."


@pytest.mark.parametrize(("stage", "name", "more"), [("base", "base", 1), ("relay", "relay", 4)])
def test_training_ends_with_a_command_that_samples_with_text(
    configuration, fit_text, tmp_path, capsys, stage, name, more
):
    fit_text("run", 4, stage=stage)
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[4].startswith(f"relay.stages.{name}.path=")
    assert len(words[5:]) == more
    assert ("prompt=red" in words) == (stage == "base")
    cfg = configuration("sample", *words[3:], f"output={tmp_path / 'samples'}", "trainer.accelerator=cpu")
    cfg.relay.seeds = cfg.seeds = "0-1"
    validate_sampling(cfg)
    assert sample(cfg)["images"] == 2


def test_the_command_names_an_encoder_of_the_hub(configuration, archive):
    cfg = configuration("train", *TINY, "text=minilm", "text.path=someone/encoder")
    stage = tiny_stage(16, context_dim=DIM, info=StageInfo(text={"encoder": {}, "hash": "a"}))
    command = sampling_command(cfg, stage, ImageDataset(archive, 16, "train"))
    assert command.endswith(" prompt=red relay.text_path=someone/encoder")


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["network.context_dim=16"], r"^network\.context_dim=16: text=none; use text=minilm or another encoder"),
        (["text=minilm", "text.max_tokens=a"], r"^text\.max_tokens=a: must be a whole number"),
        (["text=minilm", "+text.max_token=3"], r"^text\.max_token=3: .* has no such option$"),
        (["text=t5"], r"^text\.path has no value"),
        (["text=minilm", "data.text_cache=''"], r"^data\.text_cache=: must be the name of a directory"),
        (["text=minilm", "data.text_cache=train.py"], r"^data\.text_cache=train\.py: train\.py is a file"),
        (["text=minilm", "~network.context_dim"], r"^network: .*UNet has no option context_dim, which text needs"),
        (["text=minilm", "text._target_=support.none"], r"^text\._target_=support\.none: "),
    ],
)
def test_invalid_options_are_named_before_the_start(configuration, small_zip, options, message):
    cfg = configuration("train", *TINY, "resolution=16", f"data.dataset.path={small_zip}", *options)
    with pytest.raises(UserError, match=message):
        validate_training(cfg)


def test_text_is_checked_without_its_encoder(configuration, small_zip):
    """Label dropout and guidance need classes or text."""
    guided = [NO_CLASSES, "stage.label_dropout=0.1", "stage.guidance_scale=2"]
    cfg = configuration("train", *TINY, "resolution=16", f"data.dataset.path={small_zip}", *guided, "text=minilm")
    validate_training(cfg)
    assert cfg.network.context_dim == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["network.context_dim=8"],
            rf"^network\.context_dim=8: the text encoder gives {DIM} dimensions; set network\.",
        ),
        (["text.path=nowhere/at-all-"], r"^text\.path=nowhere/at-all-: no such folder"),
        (["data._target_=data_without_text.Data"], r"^data: .*unexpected keyword argument 'text'"),
    ],
)
def test_errors_of_training_are_one_line(fit_text, tmp_path, options, message):
    with pytest.raises((UserError, InstantiationException)) as caught:
        fit_text("run", 4, *options)
    error = caught.value
    with pytest.raises(UserError, match=message):
        raise error if isinstance(error, UserError) else error.__cause__
    assert not (tmp_path / "run").exists()


def test_data_without_captions(fit, folder_zip, text_options):
    with pytest.raises(UserError, match=r"^text: .*\.zip has no captions in dataset\.json; use text=none, or add them"):
        fit("run", 4, f"data.dataset.path={folder_zip}", "data.dataset.subset=''", NO_CLASSES, *text_options)


@pytest.fixture
def folder_zip(tmp_path):
    """Images without captions."""
    return write_zip(tmp_path / "plain.zip", {"a.png": encoded(pixels(0, 16)), "b.png": encoded(pixels(1, 16))})


def test_the_classes_of_an_encoder_need_trust(fit_text):
    with pytest.raises(UserError, match=r"^text is tiny_encoders\.Bert, a class outside relay_diffusion: add"):
        fit_text("run", 4, "text._target_=tiny_encoders.Bert")
    trained = fit_text("run", 4, "text._target_=tiny_encoders.Bert", "trusted=[tiny_encoders]")
    assert isinstance(trained.trainer.datamodule.text, CachedEncoder)


# ---- experiments ----


@pytest.mark.parametrize("experiment", ["emoji_text_64", "emoji_text_256"])
def test_the_weights_of_the_experiments_are_small_files(configuration, experiment):
    cfg = configuration("train", f"experiment={experiment}", "network.context_dim=384", "trainer.accelerator=cpu")
    assert cfg.text._target_ == "relay_diffusion.text.TransformersEncoder"
    with torch.device("meta"):
        stage = instantiate(cfg.stage, _convert_="all")
    assert 2 * sum(weight.numel() for weight in stage.denoiser.parameters()) < 17e6
    assert (stage.num_classes, stage.text_dim, stage.label_dropout) == (0, 384, 0.1)
    assert not cfg.data.dataset.x_flip
    assert stage.augment is None or not stage.augment.x_flip
