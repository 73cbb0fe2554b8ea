"""Git revision of the running code."""

import subprocess

from relay_diffusion.utils.git import git_revision


def test_the_commit_and_uncommitted_changes_are_returned(tmp_path, monkeypatch):
    def git(*arguments):
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    file = tmp_path / "code.py"
    file.write_text("1")
    assert git_revision(file) == {}
    git("init")
    assert git_revision(file) == {}  # a checkout that does not track it
    git("add", "code.py")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert git_revision(file) == {"commit": commit, "uncommitted_changes": False}
    file.write_text("2")
    assert git_revision(file) == {"commit": commit, "uncommitted_changes": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(file) == {}
