"""The page has what the loaded relay can do."""

import json

import pytest

from support import run

pytest.importorskip("gradio")
pytestmark = pytest.mark.slow  # importing gradio takes seconds

PROGRAM = """
import json, sys
from relay_diffusion.app.enlarging import enlarging_part
from relay_diffusion.app.interface import build_page
from relay_diffusion.app.studio import build_studio
from relay_diffusion.checkpoints.loading import load_relay

def parts(relay):
    page = build_page(build_studio("tiny", relay, {}))
    return [(part["type"], part["props"].get("label")) for part in page.config["components"]]

classes, text = (load_relay({name: f"{root}/{name}" for name in ("base", "relay")}) for root in sys.argv[1:])
print(json.dumps([parts(relay) for relay in (classes, text, enlarging_part(classes))]))
"""


def test_the_page_follows_the_relay(relay_folder, text_folder, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    result = run(str(tmp_path / "program.py"), str(relay_folder), str(text_folder))
    assert result.returncode == 0, result.stderr
    pages = json.loads(result.stdout.splitlines()[-1])
    tabs = [[label for kind, label in parts if kind == "tabitem"] for parts in pages]
    classes, text, images = ({label for _, label in parts} for parts in pages)
    assert tabs == [["Draw", "Enlarge", "Compare"], ["Draw", "Enlarge", "Compare"], ["Enlarge"]]
    assert {"Class", "Seeds", "base: steps", "relay: guidance", "Step"} <= classes
    assert {"Prompt", "Negative prompt", "base: guidance"} <= text
    assert "Prompt" not in classes
    assert "Class" not in text
    assert "Seeds" not in images
