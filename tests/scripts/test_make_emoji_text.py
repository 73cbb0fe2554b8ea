from __future__ import annotations

import json
import random
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

import make_emoji_text
from make_emoji import GROUPS_MEMBER
from make_emoji_text import (
    KEYWORDS_MEMBER,
    STYLES,
    TARBALLS,
    USAGE,
    Classes,
    Emoji,
    EmojiTextOptions,
    base_group,
    build,
    captions_of,
    further_tones,
    normalized,
    render_svg,
    subsets,
    untoned,
)
from pictures_on_disk import encoded, write_tar
from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.errors import UserError

NAMES = {
    "👍": ("thumbs up", "People & Body", ["thumbs_up", "yes", "+1", "good_job"]),
    "🐷": ("pig face", "Animals & Nature", ["pig_face", "animal"]),
    "🇫🇷": ("flag France", "Flags", ["flag_france"]),
    "1️⃣": ("keycap 1", "Symbols", ["keycap_1", "one"]),
    "🕛": ("twelve o\u2019clock", "Travel & Places", ["twelve_o_clock"]),
}


def fake_render(svg: str) -> bytes:
    """A picture in two colors, or blank, or an error, by words in the SVG."""
    if "broken" in svg:
        raise UserError("cannot be rendered")
    image = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    if "blank" not in svg:
        image.paste((255, 0, 0, 255), (0, 0, 128, 256))
    return encoded(image)


def packages(folder: Path) -> EmojiTextOptions:
    folder.mkdir()
    webp = encoded(Image.new("RGBA", (256, 256), (0, 0, 255, 51)), "WEBP", lossless=True)
    half = Image.new("RGBA", (256, 264), (0, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 128, 264))
    drawn = encoded(half, "WEBP", lossless=True)
    names = {emoji: {"name": name, "group": group} for emoji, (name, group, _) in NAMES.items()}
    icons = {
        "icons": {"thumbs": {"body": "<a/>"}, "pig": {"body": "<b/>", "height": 20}, "one": {"body": "broken"}},
        "aliases": {"thumb": {"parent": "thumbs"}},
        "width": 36,
        "height": 36,
    }
    chars = {"1f44d": "thumb", "1f44d-1f3ff": "thumbs", "1f437": "pig", "31-20e3": "one", "1f1e6": "pig", "1f600": "no"}
    noto = {"package/icons.json": json.dumps(icons).encode(), "package/chars.json": json.dumps(chars).encode()}
    files = {
        "3d": {
            "package/assets/1f44d.webp": drawn,
            "package/assets/1f437.webp": drawn,
            "package/assets/1f55b.webp": webp,
            "package/assets/0031-fe0f-20e3.webp": drawn,
            "package/assets/0031-20e3.webp": drawn,
            "package/assets/1f1eb-1f1f7.webp": drawn,
        },
        "flat": {
            "package/assets/1f44d-1f3fb.svg": b"<svg/>",
            "package/assets/1f437.svg": b"<svg>blank</svg>",
            "package/x.json": b"",
        },
        "noto": noto,
        "twemoji": noto,
        "names": {GROUPS_MEMBER: json.dumps(names).encode()},
        "keywords": {KEYWORDS_MEMBER: json.dumps({emoji: words for emoji, (_, _, words) in NAMES.items()}).encode()},
    }
    for key, members in files.items():
        write_tar(folder / TARBALLS[key], members, "w:gz")
    return EmojiTextOptions(str(folder), str(folder / "out.zip"), 64)


def test_small_packages(tmp_path: Path) -> None:
    options = packages(tmp_path / "in")
    result = build(options, fake_render)
    dataset = ImageDataset(options.destination, 64)
    captions = {name.split("/", 1)[1]: some for name, some in zip(dataset.names, dataset.captions, strict=True)}
    assert captions == {
        "3d/1f44d.png": ["thumbs up", "thumbs up, 3D style", "thumbs up, yes, good job, 3D style"],
        "3d/1f437.png": ["pig face", "pig face, 3D style", "pig face, animal, 3D style"],
        "3d/31-20e3.png": ["keycap 1", "keycap 1, 3D style", "keycap 1, one, 3D style"],
        "flat/1f44d-1f3fb.png": [
            "thumbs up, light skin tone",
            "thumbs up, light skin tone, flat style",
            "thumbs up, yes, good job, light skin tone, flat style",
        ],
        **{
            f"{style.lower()}/{points}.png": [name, f"{name}, {style} style", f"{rest}, {style} style"]
            for style in ("Noto", "Twemoji")
            for points, name, rest in (
                ("1f44d", "thumbs up", "thumbs up, yes, good job"),
                ("1f44d-1f3ff", "thumbs up, dark skin tone", "thumbs up, yes, good job, dark skin tone"),
                ("1f437", "pig face", "pig face, animal"),
            )
        },
    }
    blank = {"3d 1f55b: is blank", "flat 1f437: is blank"}
    assert set(result.unusable) == blank | {f"{s} 31-20e3: cannot be rendered" for s in ("noto", "twemoji")}
    assert (result.flags["3d"], result.unnamed["noto"]) == (1, 1)
    assert sum(result.pairs.values()) == len(dataset) == 10
    assert dataset.class_names == ["animals-nature", "people-body", "symbols"]
    index = [name.split("/", 1)[1] for name in dataset.names].index("noto/1f437.png")
    assert dataset[index][0][:, 0, [0, -1]].T.tolist() == [[255, 0, 0], [255, 255, 255]]  # on white


def test_classes_may_be_the_styles(tmp_path: Path) -> None:
    options = packages(tmp_path / "in")
    options.classes = Classes.style
    build(options, fake_render)
    dataset = ImageDataset(options.destination, 64)
    assert dataset.class_names == ["3d", "flat", "noto", "twemoji"]
    assert [dataset.class_names[k] for k in dataset.labels] == [name.split("/")[1] for name in dataset.names]


def test_same_packages_same_bytes(tmp_path: Path) -> None:
    options = packages(tmp_path / "in")
    build(options, fake_render)
    first = Path(options.destination).read_bytes()
    with pytest.raises(UserError, match="overwrite=true"):
        build(options, fake_render)
    options.overwrite = True
    build(options, fake_render)
    assert Path(options.destination).read_bytes() == first


@pytest.mark.parametrize("key", TARBALLS)
def test_a_missing_or_damaged_package_is_named(tmp_path: Path, key: str) -> None:
    options = packages(tmp_path / "in")
    path = Path(options.packages) / TARBALLS[key]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=rf"packages(=|: ).*{path.name}.*"):
        build(options, fake_render)
    path.unlink()
    with pytest.raises(UserError, match=rf"packages=.*{path.name}: no such file"):
        build(options, fake_render)
    assert not Path(options.destination).exists()


def test_resolution_is_checked(tmp_path: Path) -> None:
    options = packages(tmp_path / "in")
    options.resolution = 512
    with pytest.raises(UserError, match="resolution=512: must be 1 to 256"):
        build(options, fake_render)


@pytest.mark.parametrize(
    ("variants", "group"),
    [
        (["1f44d", "1f44d-1f3fb", "1f44d-1f3ff"], "1f44d"),
        (["1f469-200d-1f692", "1f468-1f3fd-200d-1f692", "1f9d1-1f3ff-200d-1f692"], "1f9d1-200d-1f692"),
        (["1f3c3", "1f3c3-1f3fb-200d-2640", "1f3c3-200d-2642-200d-27a1", "1f3c3-200d-27a1"], "1f3c3"),
        (["1f9d1", "1f468", "1f469-1f3fc"], "1f9d1"),
        (["1f385", "1f936-1f3fb", "1f9d1-200d-1f384"], "1f9d1-200d-1f384"),
        (["1f46b", "1f46c-1f3fb", "1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff", "1f9d1-200d-1f91d-200d-1f9d1"], "1f46d"),
        (
            ["1f48f", "1f469-200d-2764-200d-1f48b-200d-1f468", "1f9d1-1f3fb-200d-2764-200d-1f48b-200d-1f9d1-1f3fc"],
            "1f48f",
        ),
        (["1f46a", "1f468-200d-1f469-200d-1f466", "1f9d1-200d-1f9d2", "1f469-200d-1f467-200d-1f467"], "1f46a"),
        (["1f91d", "1faf1-1f3fb-200d-1faf2-1f3ff"], "1f91d"),
        (["1f46f", "1f468-1f3fb-200d-1f430-200d-1f468-1f3fe", "1f46f-200d-2640"], "1f46f"),
        (["2640"], "2640"),
        (["1f408-200d-2b1b"], "1f408-200d-2b1b"),  # the black cat is no variant of the cat
    ],
)
def test_variants_have_one_base(variants: list[str], group: str) -> None:
    assert {base_group(variant) for variant in variants} == {group}
    assert base_group(group) == group


def test_code_points_and_captions() -> None:
    assert normalized("0023-FE0F-20e3") == "23-20e3"
    couple = "1f468-1f3fb-200d-1f91d-200d-1f468-1f3ff"
    assert untoned(couple) == "1f46c"
    assert captions_of(Emoji("men holding hands", "people-body", []), couple, "flat") == [
        "men holding hands, light skin tone and dark skin tone",
        "men holding hands, light skin tone and dark skin tone, flat style",
    ]


def test_subsets_are_disjoint_and_do_not_depend_on_the_order() -> None:
    names = [f"{number:x}" for number in range(0x1F300, 0x1F300 + 2000)]
    pairs = [(name, style) for name in names for style in STYLES if (int(name, 16) + len(style)) % 3]
    found = subsets(pairs)
    shuffled = random.Random(0).sample(pairs, len(pairs))
    assert subsets(shuffled) == found
    assert subsets(pairs + [("new", style) for style in STYLES]).items() >= found.items()
    heldout = {name for name, _ in pairs if {found.get((name, style), "heldout") for style in STYLES} == {"heldout"}}
    assert 0.02 < len(heldout) / len(names) < 0.04
    composed = [pair for pair, subset in found.items() if subset == "composition"]
    assert 0.08 < len(composed) / len(pairs) < 0.12
    assert all(any(found.get((name, style)) == "train" for style in STYLES) for name, _ in composed)
    assert subsets([("1f300", "3d")])["1f300", "3d"] != "composition"  # in no other style


def test_few_skin_tones_are_kept_in_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tones = ["1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"]
    pictures = [(style, f"{emoji}-{tone}") for emoji in ("1f44d", "1f44e") for tone in tones for style in STYLES]
    plain = [(style, "1f44d") for style in STYLES]
    further = further_tones(pictures + plain, 2)
    assert further == further_tones([*plain, *pictures[::-1]], 2)
    kept = sorted(set(pictures) - further)
    assert len(kept) == 2 * 2 * len(STYLES)
    assert len({points for _, points in kept}) > 4  # styles keep different tones
    assert further.isdisjoint(plain)
    assert further_tones(pictures, 5) == set()

    monkeypatch.setattr(make_emoji_text, "chosen", lambda *_: False)  # all are in train
    options = packages(tmp_path / "in")
    build(options, fake_render)
    before = ImageDataset(options.destination, 64).names
    options.tones, options.overwrite = 0, True
    result = build(options, fake_render)
    moved = {name.replace("train/", "tones/") if "1f3f" in name else name for name in before}
    assert set(ImageDataset(options.destination, 64).names) == moved != set(before)
    count = sum(name.startswith("tones/") for name in moved)
    assert sum(pairs for (_, subset), pairs in result.pairs.items() if subset == "tones") == count

    options.tones = -1
    with pytest.raises(UserError, match="tones=-1: must be at least 0"):
        build(options, fake_render)


def test_the_renderer_is_named_if_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_emoji_text, "find_spec", lambda _: None)
    arguments = [f"packages={tmp_path}", f"destination={tmp_path / 'out.zip'}"]
    assert run_tool(arguments, USAGE, EmojiTextOptions, make_emoji_text._build_and_report) == 2
    assert capsys.readouterr().err == "error: rendering SVG needs resvg-py: pip install -e '.[emoji]'\n"


def test_svg_that_needs_fonts_or_files_is_refused() -> None:
    pytest.importorskip("resvg_py", reason="pip install -e '.[emoji]'")
    for element in ("<text>x</text>", '<image href="data:x"/>', '<use href="/etc/passwd#x"/>'):
        with pytest.raises(UserError, match="needs fonts or other files"):
            render_svg(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{element}</svg>')
    with pytest.raises(UserError, match="cannot be rendered"):
        render_svg("<svg")


def test_gradients_and_clip_paths_are_rendered() -> None:
    pytest.importorskip("resvg_py", reason="pip install -e '.[emoji]'")
    svg = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 8 8">
      <defs><linearGradient id="g"><stop stop-color="#f00"/><stop offset="1" stop-color="#00f"/></linearGradient>
      <clipPath id="c"><path d="M0 0h8v4h-8z"/></clipPath><path id="p" d="M0 0h8v8h-8z"/></defs>
      <use xlink:href="#p" fill="url(#g)" clip-path="url(#c)"/></svg>"""
    image = Image.open(BytesIO(render_svg(svg))).convert("RGBA")
    assert image.size == (256, 256)
    left, right, below = (image.getpixel(at) for at in ((4, 60), (251, 60), (128, 200)))
    assert left[0] > 240 > 20 > left[2]
    assert right[2] > 240 > 20 > right[0]
    assert (left[3], right[3], below[3]) == (255, 255, 0)
