"""A command in a fork ends and prints as in a new interpreter."""

import os
import signal
import subprocess
import sys

import pytest

from forked import Fork, run_forked

SCRIPTS = {
    "prints": "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['HOME'], __name__, sys.path[0])",
    "fails": "import sys; print('said'); raise SystemExit('error: no')",
    "code": "raise SystemExit(7)",
    "breaks": "1 / 0",
    "says goodbye": "import atexit; atexit.register(print, 'goodbye')",
    "is killed": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "imports": "import neighbor; print(neighbor.__file__)",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fork_is_as_a_new_interpreter(tmp_path, name):
    (tmp_path / "neighbor.py").write_text("")
    (tmp_path / "script.py").write_text(SCRIPTS[name])
    command = [str(tmp_path / "script.py"), "a", "b c"]
    expected = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    forked = run_forked(command, tmp_path, 60)
    assert forked.returncode == expected.returncode
    assert forked.stdout == expected.stdout
    assert forked.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]  # a traceback has other first lines


def test_a_fork_that_hangs_is_killed(tmp_path):
    (tmp_path / "script.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired) as ended:
        run_forked([str(tmp_path / "script.py")], tmp_path, 3)
    assert ended.value.output == "begun\n"


def test_a_fork_is_watched_and_signaled_as_a_process_is(tmp_path):
    (tmp_path / "script.py").write_text("import os, time; print(os.environ['WHO'], flush=True); time.sleep(600)")
    output = tmp_path / "output.txt"
    env = os.environ | {"WHO": "a rank"}
    fork = Fork([sys.executable, "script.py"], tmp_path, env, start_new_session=True, stdout=output, stderr=output)
    try:
        assert os.getsid(fork.pid) == fork.pid
        with pytest.raises(subprocess.TimeoutExpired):
            fork.wait(0.1)
        while not (output.exists() and output.read_text()):
            assert fork.poll() is None
    finally:
        fork.terminate()
    assert fork.wait() == fork.poll() == -signal.SIGTERM
    assert output.read_text() == "a rank\n"
