"""Captions: of data sets, in training batches, and in the converter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from pictures_on_disk import pngs, write_folder, write_tar, write_zip
from relay_diffusion.data.convert import Captions, Classes, Converted, ConvertOptions, convert
from relay_diffusion.data.datamodule import ImageDataModule, InfiniteSampler, chosen_caption
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.errors import UserError

NAMES = ["train/a.png", "train/b.png", "val/c.png"]
CAPTIONS = [["train/a.png", ["an apple", " red fruit "]], ["val/c.png", "a cat"]]


def captioned(path: Path, **others: object) -> Path:
    return write_zip(path, pngs(NAMES), {"captions": CAPTIONS, **others})


# ---- data sets ----


def test_captions_follow_the_images_of_a_subset(tmp_path: Path) -> None:
    path = captioned(tmp_path / "a.zip", labels=[[name, 0] for name in NAMES])
    assert ImageDataset(path, 8).captions == [["an apple", "red fruit"], [], ["a cat"]]
    assert ImageDataset(path, 8, subset="val").captions == [["a cat"]]
    assert ImageDataset(path, 8, subset="val").labels == [0]


def test_captions_need_no_labels(tmp_path: Path) -> None:
    dataset = ImageDataset(captioned(tmp_path / "a.zip", labels=None), 8)
    assert (dataset.num_classes, dataset.captions[2]) == (0, ["a cat"])


@pytest.mark.parametrize("description", [None, {"labels": None}, {"captions": None}, {"captions": []}])
def test_sets_without_captions(tmp_path: Path, description: object) -> None:
    assert ImageDataset(write_zip(tmp_path / "a.zip", pngs(NAMES), description), 8).captions == [[], [], []]


def test_blank_captions_are_missing(tmp_path: Path) -> None:
    entries = [["train/a.png", " \n"], ["train/b.png", ["", "b"]], ["val/c.png", []]]
    path = write_zip(tmp_path / "a.zip", pngs(NAMES), {"captions": entries})
    assert ImageDataset(path, 8).captions == [[], ["b"], []]


def test_captions_do_not_change_the_hash_of_the_images(tmp_path: Path) -> None:
    plain = ImageDataset(write_zip(tmp_path / "plain.zip", pngs(NAMES)), 8)
    assert ImageDataset(captioned(tmp_path / "a.zip"), 8).source_hash == plain.source_hash


def test_the_writer_stores_captions_only_if_there_are_some(tmp_path: Path) -> None:
    pictures = pngs(["a.png", "b.png"])
    for name, captions in (("with.zip", ["one", "two"]), ("without.zip", [])):
        with image_zip(tmp_path / name) as writer:
            writer.add_encoded("a.png", pictures["a.png"], captions=captions)
            writer.add_encoded("b.png", pictures["b.png"])
    assert ImageDataset(tmp_path / "with.zip", 8).captions == [["one", "two"], []]
    without = ImageDataset(tmp_path / "without.zip", 8)
    assert without._set._source.read("dataset.json") == b'{"labels": null}'


# ---- training batches ----


def test_the_choice_of_a_caption_is_fixed() -> None:
    captions = ["a", "b", "c"]
    assert "".join(chosen_caption(captions, 0, position) for position in range(16)) == "bacaaccbbacbbcab"
    assert "".join(chosen_caption(captions, 1, position) for position in range(16)) != "bacaaccbbacbbcab"
    assert chosen_caption([], 0, 3) == ""


def test_all_captions_are_equally_probable() -> None:
    for seed in (0, 2**63 - 1):
        counts = Counter(chosen_caption("abc", seed, position) for position in range(30_000))
        assert all(abs(count - 10_000) < 400 for count in counts.values())
    pairs = Counter((chosen_caption("ab", 0, p), chosen_caption("ab", 0, p + 1)) for p in range(40_000))
    assert all(abs(count - 10_000) < 400 for count in pairs.values())  # neighbors in a batch are independent


class Prompts(L.LightningModule):
    """Stage stand-in that records images, labels and prompts."""

    def __init__(self, images_seen: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.images_seen = images_seen
        self.visits: list[tuple[int, str]] = []

    def training_step(self, batch: tuple[Tensor, Tensor, list[str]], batch_idx: int) -> Tensor:  # noqa: ARG002
        images, labels, prompts = batch
        assert isinstance(images, Tensor)
        assert all(type(prompt) is str for prompt in prompts)
        self.visits += zip(labels.tolist(), prompts, strict=True)
        self.images_seen += len(images)
        self.log("loss", images.float().mean(), batch_size=len(images))
        return self.weight * images.float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Zip of ten images, labeled by their index, with as many captions as the index."""
    names = [f"{index}.png" for index in range(10)]
    captions = [[name, [f"{name[0]}{letter}" for letter in "abcdefghi"[: int(name[0])]]] for name in names]
    return write_zip(
        tmp_path / "a.zip", pngs(names), {"labels": [[name, int(name[0])] for name in names], "captions": captions}
    )


def fit(archive: Path, module: Prompts, steps: int, cache: bool = False, workers: int = 0, accumulate: int = 1) -> list:
    dataset = ImageDataset(archive, 8, x_flip=True, cache=cache)
    data = ImageDataModule(dataset, 4, num_workers=workers, seed=3, captions=True)
    trainer = L.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    return module.visits


def expected(first: int, count: int) -> list[tuple[int, str]]:
    """Labels and prompts at positions of the stream of 20 items, ten of which are mirrored."""
    visits = []
    for position, index in enumerate(InfiniteSampler(20, 4, seed=3).stream(first, count), first):
        label = index % 10
        captions = [f"{label}{letter}" for letter in "abcdefghi"[:label]]
        visits.append((label, chosen_caption(captions, 3, position)))
    return visits


lightning_noise = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*many workers", "ignore:.*srun")


@lightning_noise
@pytest.mark.parametrize(
    ("cache", "workers", "accumulate"), [(True, 2, 1), (False, 0, 1), pytest.param(False, 2, 2, marks=pytest.mark.slow)]
)
def test_lightning_gets_a_prompt_for_each_visit(archive: Path, cache: bool, workers: int, accumulate: int) -> None:
    visits = fit(archive, Prompts(), 12, cache, workers, accumulate)
    assert visits == expected(0, 48)
    assert {label for label, _ in visits} == set(range(10))  # 0 has no caption
    assert len({prompt for label, prompt in visits if label == 9}) > 1


@lightning_noise
def test_a_resumed_run_continues_with_the_same_prompts(archive: Path) -> None:
    assert fit(archive, Prompts(images_seen=12), 3) == expected(12, 12)


def test_prompts_do_not_depend_on_the_number_of_ranks() -> None:
    steps = []
    for world in (1, 2, 4):
        parts = [next(InfiniteSampler(17, 12, 5, rank, world, start=24).positions()) for rank in range(world)]
        steps.append([position for part in parts for position in part])
    assert steps[0] == steps[1] == steps[2] == list(range(24, 36))


def test_missing_captions_are_counted(archive: Path) -> None:
    assert ImageDataModule(ImageDataset(archive, 8), 4, captions=True).missing_captions == 1


def test_a_set_without_captions_is_refused(tmp_path: Path) -> None:
    dataset = ImageDataset(write_zip(tmp_path / "a.zip", pngs(["a.png"])), 8)
    with pytest.raises(UserError, match=r"^text: .*a\.zip has no captions in dataset\.json; use text=none"):
        ImageDataModule(dataset, 2, captions=True)


def test_the_emoji_with_text_are_a_choice_of_data(configuration, archive: Path) -> None:
    cfg = configuration("train", "data=emoji_text", f"data.dataset.path={archive}", "data.dataset.subset=''")
    cfg.data.dataset.resolution = 8
    data = instantiate(cfg.data)
    assert data.missing_captions == 1
    assert not data.dataset.x_flip


# ---- the converter ----


def to_zip(source: Path, tmp_path: Path, captions: Captions, **others: object) -> tuple[Converted, dict]:
    options = ConvertOptions(str(source), str(tmp_path / "out.zip"), 8, classes=Classes.none, captions=captions)
    for name, value in others.items():
        setattr(options, name, value)
    result = convert(options)
    dataset = ImageDataset(tmp_path / "out.zip", 8)
    return result, dict(zip(dataset.names, dataset.captions, strict=True))


TEXTS = {
    "x/a.txt": "an apple\n\n  red fruit \n".encode("utf-8-sig"),
    "x/c.txt": b"\r\n",
    "README.txt": b"hello",
    "x/more.md": b"",
}


@pytest.mark.parametrize("write", [write_zip, write_folder, write_tar])
def test_text_files_beside_the_images(tmp_path: Path, write) -> None:
    source = write(tmp_path / "in", TEXTS | pngs(["x/a.png", "x/b.png", "x/c.png"]))
    result, captions = to_zip(source, tmp_path, Captions.txt)
    assert captions == {"x/a.png": ["an apple", "red fruit"], "x/b.png": [], "x/c.png": []}
    assert result.captions == {"x/a.png": ["an apple", "red fruit"]}
    assert result.unused_captions == ["README.txt"]
    assert result.ignored == ["x/more.md"]


def test_captions_get_the_written_names(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", pngs(["all/x/a.png", "all/y/b.png"]) | {"all/x/a.txt": "ä".encode()})
    options = ConvertOptions(str(source), str(tmp_path / "out.zip"), 8, captions=Captions.txt)
    assert convert(options).captions == {"x/a.png": ["ä"]}


def test_a_json_file(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "in.zip", pngs(["a.png", "x/b.png", "c.png"]))
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"a.png": "one", "./x/b.png": ["two", "three"], "d.png": "four"}))
    result, captions = to_zip(source, tmp_path, Captions.json, captions_file=str(file))
    assert captions == {"a.png": ["one"], "c.png": [], "x/b.png": ["two", "three"]}
    assert result.unused_captions == ["d.png"]


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_metadata_tables_of_the_source(tmp_path: Path, write) -> None:
    table = 'file_name,text,score\na.png,"red, round",1\na.png,fruit,2\nx/b.png,,3\nz.png,none,4\n'
    lines = '{"file_name": "c.png", "text": ["one", "two"]}\n\n{"file_name": "d.png", "text": null}\n'
    files = {"x/metadata.csv": table.encode(), "metadata.jsonl": lines.encode()}
    source = write(tmp_path / "in", files | pngs(["x/a.png", "x/x/b.png", "c.png", "d.png"]))
    result, captions = to_zip(source, tmp_path, Captions.metadata)
    assert captions == {"c.png": ["one", "two"], "d.png": [], "x/a.png": ["red, round", "fruit"], "x/x/b.png": []}
    assert result.unused_captions == ["x/z.png"]
    assert result.ignored == []


def test_a_metadata_table_elsewhere_and_another_column(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "in.zip", pngs(["x/a.png"]))
    file = tmp_path / "captions.csv"
    file.write_text("caption,file_name\nhello,x/a.png\n")
    options = {"captions_file": str(file), "captions_column": "caption"}
    assert to_zip(source, tmp_path, Captions.metadata, **options)[1] == {"x/a.png": ["hello"]}
    options["captions_column"] = "captoin"
    with pytest.raises(UserError, match=r"captions_column=captoin: is no column of .*; did you mean caption\?"):
        to_zip(source, tmp_path, Captions.metadata, overwrite=True, **options)


def test_captions_of_the_source_are_kept_unless_dropped(tmp_path: Path) -> None:
    source = captioned(tmp_path / "in.zip")
    assert to_zip(source, tmp_path, Captions.keep)[1]["train/a.png"] == ["an apple", "red fruit"]
    result, captions = to_zip(source, tmp_path, Captions.none, overwrite=True)
    assert not any(captions.values())
    assert result.captions == {}


@pytest.mark.parametrize(
    ("captions", "others", "message"),
    [
        (Captions.txt, {}, "captions=txt: none of 1 images has a caption"),
        (Captions.json, {}, "captions=json: needs captions_file"),
        (Captions.txt, {"captions_file": "a.json"}, "captions_file=a.json: is for captions=json and captions=metadata"),
        (Captions.json, {"captions_file": "missing.json"}, "captions_file=missing.json: no such file"),
        (Captions.keep, {"captions_column": "text"}, "captions_column=text: is for captions=metadata"),
        (Captions.metadata, {}, "has no metadata.csv or metadata.jsonl"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, captions: Captions, others: dict, message: str) -> None:
    source = write_zip(tmp_path / "in.zip", pngs(["a.png"]))
    with pytest.raises(UserError, match=message):
        to_zip(source, tmp_path, captions, **others)
    assert not (tmp_path / "out.zip").exists()


@pytest.mark.slow
def test_the_summary_counts_captions(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", TEXTS | pngs(["x/a.png", "x/b.png", "x/c.png"]))
    arguments = [f"source={source}", f"destination={tmp_path / 'out.zip'}", "captions=txt", "classes=none"]
    command = [sys.executable, "-m", "relay_diffusion.cli.convert_images", *arguments, "resolution=8"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "captions: 1 of 3 images\n  2 without (x/b.png, x/c.png)\n  1 unused (README.txt)\n" in printed
