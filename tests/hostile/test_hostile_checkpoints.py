"""Hostile checkpoints, exports and statistics: a UserError that names the file, or they load."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from relay_diffusion.checkpoints.export import export_stage
from relay_diffusion.checkpoints.loading import load_stage, read_checkpoint
from relay_diffusion.data.npz import Npz
from relay_diffusion.errors import UserError
from relay_diffusion.metrics.reference import read_reference
from relay_diffusion.training import resume
from relay_diffusion.utils.files import file_sha256

TRAINED: list[bytes] = []  # once for all tests
NAME = "denoiser.network.conv_in.weight"
SMALL = ["network.channel_mult=[1]"]  # few tensors: every test writes and reads all of them many times


@pytest.fixture
def checkpoint(fit: Callable[..., Any], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of a short training run, and its content."""
    path = tmp_path / "run/checkpoints/last.ckpt"
    if not TRAINED:
        fit("run", 8, *SMALL)
        TRAINED.append(path.read_bytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(TRAINED[0])
    return path, torch.load(path, weights_only=True)


def message_of(action: Callable[[], Any], path: Path) -> str:
    """Return the one-line error for `path`; another exception fails the test."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < len(str(path)) * 2 + 400
    return message.replace(str(path), "")


def refused(path: Path, content: Any, *words: str, resumed: bool = True, sampled: bool = True) -> None:
    """Check that sampling and resuming refuse this content in one line with these words."""
    torch.save(content, path)
    readers = [lambda: load_stage(path, "raw")] * sampled + [lambda: read_checkpoint(path)] * resumed
    for reader in readers:
        message = message_of(reader, path)
        for word in words:
            assert word in message, message


def with_(content: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy with the value of `place` (keys with / between them) replaced, or removed if the value is `with_`."""
    changed = node = dict(content)
    *parents, last = place.split("/")
    for key in parents:
        node[key] = dict(node[key])
        node = node[key]
    if value is with_:
        node.pop(last, None)
    else:
        node[last] = value
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_weights_are_refused(checkpoint, fit, value) -> None:
    path, content = checkpoint
    good = path.read_bytes()
    broken = copy.deepcopy(content)
    broken["state_dict"][NAME][0, 0, 0, 1] = value
    refused(path, broken, "not finite, first in", "network.conv_in.weight")
    with pytest.raises(UserError, match=r"last\.ckpt"):
        fit("run", 16, *SMALL)  # training does not resume from it either
    path.write_bytes(good)
    broken = copy.deepcopy(content)
    broken["ema"]["weights"]["network.conv_in.weight"][0, 0, 0, 1] = value
    refused(path, broken, "not finite, first in ema network.conv_in.weight", sampled=False)
    assert "not finite" in message_of(lambda: load_stage(path, "ema"), path)
    load_stage(path, "raw")  # these are whole
    broken = copy.deepcopy(content)
    broken["optimizer_states"][0]["state"][0]["exp_avg"][0, 0] = value
    refused(path, broken, "not finite, first in optimizer state 0.exp_avg", sampled=False)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(3), ["network.conv_in.weight is [3], not [8, 3, 3, 3]"]),
        (torch.zeros(8, 3, 3, 3, dtype=torch.int64), ["must hold float numbers, not torch.int64"]),
        (torch.zeros(8, 3, 3, 3, dtype=torch.complex64), ["must hold float numbers, not torch.complex64"]),
        (torch.zeros(8, 3, 3, 3, dtype=torch.bool), ["must hold float numbers, not torch.bool"]),
        (torch.zeros(8, 3, 3, 3).to_sparse(), ["must hold float numbers, not torch.float32 torch.sparse_coo"]),
        (torch.zeros(8, 3, 3, 3, device="meta"), ["must hold float numbers"]),
        (torch.zeros(1).expand(10**12), ["has more elements than it stores"]),
        ("text", ["must be a tensor, not str text"]),
        (None, ["must be a tensor"]),
    ],
)
def test_tensors_of_the_wrong_type_are_refused(checkpoint, tensor, words) -> None:
    path, content = checkpoint
    refused(path, with_(content, f"state_dict/{NAME}", tensor), *words)


def test_ema_weights_of_the_wrong_shape_are_refused(checkpoint) -> None:
    path, content = checkpoint
    name = next(iter(content["ema"]["weights"]))
    for wrong in (with_, torch.zeros(3)):
        changed = with_(content, f"ema/weights/{name}", wrong)
        refused(path, changed, "the EMA weights in", name, sampled=False)


def test_missing_and_unknown_tensors_are_refused(checkpoint) -> None:
    path, content = checkpoint
    refused(path, with_(content, f"state_dict/{NAME}", with_), "it lacks", "network.conv_in.weight")
    more = with_(content, "state_dict/denoiser.other", torch.zeros(1))
    refused(path, more, "it also holds", "other")
    refused(path, with_(content, "state_dict", {7: torch.zeros(1)}), "state_dict[7]")


GARBAGE = [
    None, True, 7, -1, 1e308, math.nan, "text\n\x1b[2J", b"bytes", [], [1, "a"], {}, {"a": {"b": 3}}, {1: 2}, (1, 2),
    torch.zeros(2), with_,
]  # fmt: skip
KEYS = ("stage_config", "state_dict", "ema", "class_names", "images_seen", "replaced_gradients", "optimizer_states",
        "loops", "dealt", "run", "run/config", "run/derived", "run/devices", "run/wandb", "epoch", "global_step",
        "pytorch-lightning_version")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_any_key_is_refused_or_read(checkpoint, key) -> None:
    path, content = checkpoint
    outcomes, readers = set(), [lambda: read_checkpoint(path)]
    if key in KEYS[:5]:  # sampling does not read the others
        readers.append(lambda: load_stage(path, "ema" if key == "ema" else "raw"))
    for value in GARBAGE:
        torch.save(with_(content, key, value), path)
        for reader in readers:
            try:
                read = reader()
                if key.startswith("run") and "run" in read:
                    resume.changes(read.get("run", {}), content["run"])  # whatever was read can be compared
                outcomes.add("read")
            except UserError as error:
                outcomes.add("refused")
                assert str(path) in str(error)  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017
    assert "refused" in outcomes


def _deep(levels: int) -> list[Any]:
    node: list[Any] = []
    for _ in range(levels):
        node = [node]
    return node


@pytest.mark.slow
def test_stored_configs_of_extreme_size_are_refused(checkpoint) -> None:
    path, content = checkpoint
    network = "stage_config/denoiser/network"
    for name, value in (("channels", 10**6), ("channels", 10**12), ("num_classes", 10**13), ("image_channels", 10**9)):
        refused(path, with_(content, f"{network}/{name}", value), resumed=False)
    refused(path, with_(content, f"{network}/blocks", 10**12), "between 1 and 100", resumed=False)
    refused(path, with_(content, f"{network}/channel_mult", [1] * 1000), "at most 64 times the channels", resumed=False)
    refused(path, with_(content, "stage_config/sampler/steps", 10**12), "between 1 and 100,000", resumed=False)
    refused(path, with_(content, "stage_config/sampler/rho", math.nan), "cannot be built", resumed=False)
    refused(path, with_(content, "stage_config/deep", _deep(30)), "nested too deeply")
    refused(path, with_(content, "stage_config/deep", _deep(200)), "nested too deeply")
    refused(path, with_(content, "stage_config/odd", torch.zeros(1)), "stage_config.odd must be")
    refused(path, with_(content, "stage_config/odd", "${oc.env:HOME}"), "interpolation", resumed=False)
    refused(path, with_(content, "stage_config/loss/_target_", "os.system"), "names 'os.system'", resumed=False)
    refused(path, with_(content, "stage_config/loss/_args_", [1, 2, 3, 4]), "cannot be built", resumed=False)


def test_truncated_checkpoints_are_refused(checkpoint) -> None:
    path, _ = checkpoint
    content, generator = path.read_bytes(), random.Random(0)
    for length in [0, 1, *(generator.randrange(len(content)) for _ in range(20)), len(content) - 1]:
        path.write_bytes(content[:length])
        for reader in (load_stage, read_checkpoint):
            assert "cannot be read as a checkpoint" in message_of(lambda read=reader: read(path), path)


@pytest.mark.slow
def test_checkpoints_with_a_changed_byte_are_refused_or_read(checkpoint) -> None:
    """It is refused by name, or it is read (a byte within weights may be any other)."""
    path, _ = checkpoint
    content, generator = path.read_bytes(), random.Random(0)
    pickle_at, pickle_end = content.index(b"data.pkl"), content.index(b"PK\x07\x08")
    positions = [generator.randrange(pickle_at, pickle_end) for _ in range(16)]  # where the structure is
    positions += [len(content) - generator.randrange(1, 2000) for _ in range(8)]  # the directory
    positions += [generator.randrange(len(content)) for _ in range(8)]
    refused_, read = 0, 0
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            load_stage(path)
            read += 1
        except UserError as error:
            refused_ += 1
            assert str(path) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    assert refused_ > 8
    assert read > 3


def test_code_in_checkpoints_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {trap}",)

    path = tmp_path / "evil.ckpt"
    torch.save({"stage_config": Evil()}, path)
    for reader in (load_stage, read_checkpoint):
        assert "more than tensors and plain values" in message_of(lambda read=reader: read(path), path)
    assert not trap.exists()


def test_changes_of_the_wrong_type_are_refused(checkpoint) -> None:
    path, _ = checkpoint
    for changes, words in (
        ({"sampler": {"steps": "abc"}}, "sampler.steps=abc must be a number; stored is 4"),
        ({"sampler": {"steps": 2.5}}, "steps=2.5: must be a whole number"),
        ({"sampler": {"steps": True}}, "sampler.steps=True must be a number"),
        ({"sampler": {"rho": [7]}}, "sampler.rho=[7] must be a number; stored is 7.0"),
        ({"sampler": 5}, "sampler=5 must be a mapping"),
        ({"guidance_scale": "strong"}, "guidance_scale=strong must be a number; stored is 1.0"),
        ({"cuda_graphs": 1}, "cuda_graphs=1 must be true or false; stored is True"),
        ({"guidance_interval": "all"}, "guidance_interval"),
        ({"samplr": {"steps": 3}}, "samplr: unknown key; did you mean sampler?"),
        ({"sampler": {"step": 3}}, "sampler.step: unknown key; did you mean steps?"),
    ):
        message = message_of(lambda c=changes: load_stage(path, changes=c), path)
        assert words in message, message


# --- exports and statistics


def test_exports_of_hostile_weights(checkpoint, tmp_path: Path) -> None:
    _, content = checkpoint
    weights = content["ema"]["weights"]
    folder = export_stage(content["stage_config"], weights, tmp_path / "shared", ["dark", "light"], 8)
    file, text = folder / "stage.json", (folder / "stage.json").read_text()
    good = load_file(folder / "weights.safetensors")
    name = "network.conv_in.weight"

    def said(state: dict[str, Any], **changes: Any) -> str:
        save_file(state, folder / "weights.safetensors")
        described = json.loads(text) | changes
        described["weights"]["sha256"] = file_sha256(folder / "weights.safetensors")
        file.write_text(json.dumps(described))
        return message_of(lambda: load_stage(folder), folder)

    assert "not finite, first in network.conv_in.weight" in said(good | {name: good[name] * math.nan})
    assert "is [3], not [8, 3, 3, 3]" in said(good | {name: torch.zeros(3)})
    assert "must hold float numbers" in said(good | {name: good[name].long()})
    assert "it lacks network.conv_in.weight" in said({k: v for k, v in good.items() if k != name})
    assert "it also holds other" in said(good | {"other": torch.zeros(1)})
    assert "class_names must be" in said(good, class_names=[1])
    assert "images_seen must be" in said(good, images_seen=-1)
    assert "damaged" in said(good, images_seen="8")
    whole = (folder / "weights.safetensors").read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        (folder / "weights.safetensors").write_bytes(damaged)
        message_of(lambda: load_stage(folder), folder)  # another fingerprint
    huge = (2**40).to_bytes(8, "little") + whole[8:]
    (folder / "weights.safetensors").write_bytes(huge)
    described = json.loads(text)
    described["weights"]["sha256"] = file_sha256(folder / "weights.safetensors")
    file.write_text(json.dumps(described))
    assert "cannot be read: it is damaged" in message_of(lambda: load_stage(folder), folder)


@pytest.mark.slow
def test_damaged_statistics_are_refused_or_read(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    np.savez_compressed(path, mu=np.zeros(2048), sigma=np.eye(2048), layout=np.str_("NCHW"))
    content, generator = path.read_bytes(), random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    cut = [content[: generator.randrange(len(content))] for _ in range(10)]
    flipped = [bytearray(content) for _ in range(30)]
    for damaged in flipped:
        damaged[generator.randrange(len(content))] ^= 0x21
    for damaged in [*cut, *flipped]:
        path.write_bytes(damaged)
        try:
            read_reference(Npz(path, "reference"))
            outcomes["read"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            assert str(error).startswith(f"reference={path}")  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    assert outcomes["refused"] > 20


@pytest.mark.slow
def test_statistics_that_claim_much_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, mu=np.zeros(2048), sigma=np.eye(2048))
    header = {"descr": "<f4", "fortran_order": False, "shape": (132_000, 2048)}
    zeros = bytes(8192 * 1000)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("features.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(132):
            file.write(zeros)
    tracemalloc.start()
    message = message_of(lambda: read_reference(Npz(path, "reference")), path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "'features' cannot be read (it claims 1,081,344,128 bytes" in message
    assert peak < 200 << 20
