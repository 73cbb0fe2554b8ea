"""Exclusive lock of a run directory; imports neither torch nor lightning."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from relay_diffusion.errors import UserError

LOCK = "run.lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # file systems without locks


@dataclass(frozen=True)
class Holder:
    """Process that holds a lock, as recorded in the lock file.

    started: clock ticks from boot to the start of the process, which distinguish it from a later one with the same pid.
    boot, namespace: identify the running kernel and its set of pids. job, restarts: from SLURM, or empty.
    """

    host: str
    pid: int
    started: str
    boot: str
    namespace: str
    job: str
    restarts: int

    @classmethod
    def this_process(cls) -> Holder:
        """Describe the calling process."""
        job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_start_time(os.getpid()),
            boot=_identifier(Path("/proc/sys/kernel/random/boot_id")),
            namespace=_identifier(Path("/proc/self/ns/pid")),
            job=job,
            restarts=int(restarts) if restarts.isdecimal() else 0,
        )

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """Parse a lock file; None if it names no process.

        A lock file that is being written names none.
        """
        try:
            content = json.loads(text)
            if {name: type(value).__name__ for name, value in content.items()} == cls.__annotations__:
                return cls(**content)
        except (ValueError, AttributeError):
            pass
        return None

    def is_stale(self, me: Holder, kernel_locks: bool) -> bool | None:
        """Return whether the process has ended; None if this host cannot tell.

        kernel_locks: the file system supports locks, and this process just acquired the lock.
        """
        if (self.host, self.boot, self.namespace) == (me.host, me.boot, me.namespace):
            return _start_time(self.pid) != self.started
        if self.boot and self.boot == me.boot:  # another container of this host, whose pids mean other processes
            return True if kernel_locks else None
        if self.host == me.host:
            return True  # the host was rebooted
        if self.job and self.job == me.job and self.restarts < me.restarts:
            return True  # SLURM ends a job on all hosts before it restarts it
        return None


@contextmanager
def run_lock(directory: str | Path, option: str) -> Iterator[None]:
    """Create and lock a run directory; remove it if it stays empty.

    Two mechanisms cover each other's gaps. A POSIX lock on `directory`/run.lock is released when its process ends for
    any reason, and also works between hosts where the file system supports it; unlike flock() it is not inherited by
    data workers, which outlive a killed process for some seconds. The content of the file (host, pid, start time)
    names the holder in messages, and decides where the file system has no locks or only those of one host.
    Raises UserError (with `option`) if another process uses the directory, or a process on another host may.
    """
    directory = Path(directory)
    path = directory / LOCK
    created: list[Path] = []
    try:
        try:
            created = [place for place in (directory, *directory.parents) if not place.exists()]
            directory.mkdir(parents=True, exist_ok=True)
            handle = _acquire(path, option)
        except OSError as error:
            raise UserError(
                f"{option}={directory}: cannot be created or locked ({error.strerror}); choose another {option}"
            ) from None
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()  # before unlocking: afterwards the file may belong to the next process
            os.close(handle)
    finally:
        with suppress(OSError):
            for place in created:
                place.rmdir()  # a run that failed early; directories with files stay


def is_locked(directory: str | Path) -> bool:
    """Return whether a process uses a run directory.

    Also true for a process on another host that may have ended.
    """
    try:
        holder = Holder.parse((Path(directory) / LOCK).read_text(errors="replace"))
    except OSError:
        return False
    return holder is None or not holder.is_stale(Holder.this_process(), kernel_locks=False)


def _acquire(path: Path, option: str) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            supported = _lock(handle)
            holder = Holder.parse(os.pread(handle, 2**16, 0).decode(errors="replace"))
            if supported is None:
                raise _refusal(path, option, holder, in_use=True)
            if not _is_current(handle, path):  # its process has exited and removed the file
                os.close(handle)
                continue
            me = Holder.this_process()
            stale = True if holder is None else holder.is_stale(me, supported)
            if not stale:
                raise _refusal(path, option, holder, in_use=stale is False)
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(asdict(me)).encode(), 0)
            os.fsync(handle)
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise
        return handle


def _lock(handle: int) -> bool | None:
    """Try to lock a file.

    True: locked. False: the file system has no locks. None: another process holds the lock.
    """
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return None
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def _is_current(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _refusal(path: Path, option: str, holder: Holder | None, in_use: bool) -> UserError:
    who = "another process" if holder is None else f"process {holder.pid} on host {holder.host}"
    if in_use:
        state = f"in use by {who}; wait until it ends, stop it, or choose another {option} (if no such process runs"
        return UserError(f"{option}={path.parent}: {state}, delete {path})")
    state = f"locked by {who}, which host {socket.gethostname()} cannot check; if it no longer runs there"
    return UserError(f"{option}={path.parent}: {state}, delete {path}")


def _start_time(pid: int) -> str:
    """Return the start of a process in clock ticks since boot.

    "ended" if no such process runs, "" without /proc.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "ended" if stat[0] in "ZX" else stat[19]
    except (FileNotFoundError, ProcessLookupError):
        pass
    try:
        os.kill(pid, 0)  # signal 0 only tests whether the process exists
    except ProcessLookupError:
        return "ended"
    except (PermissionError, OverflowError):
        pass
    return ""


def _identifier(path: Path) -> str:
    """Read a file or link target in /proc; "" if missing."""
    try:
        return str(path.readlink()) if path.is_symlink() else path.read_text().strip()
    except OSError:
        return ""
