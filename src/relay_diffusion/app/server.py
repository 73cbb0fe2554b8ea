"""Serve the page and remove its temporary folder at the end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from starlette.middleware import Middleware

from relay_diffusion.app.interface import build_page, page_style
from relay_diffusion.app.studio import Studio

TEMPORARY_FOLDER = "GRADIO_TEMP_DIR"  # variable of gradio, which has no argument for it
MAX_UPLOAD = "64mb"
MAX_WAITING = 16  # jobs in the queue
MAX_SESSIONS = 32  # whose trajectories are kept in memory

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class RefuseForeignFiles:
    """ASGI middleware that refuses file addresses outside this server.

    Gradio would fetch /file=https://... from the internet for anyone.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 to such an address, and pass everything else on."""
        _, equals, name = scope.get("path", "").partition("/file=")
        if equals and ":" in name.split("/")[0]:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, send)


@contextmanager
def serving(studio: Studio, host: str = "127.0.0.1", port: int = 7860) -> Iterator[str]:
    """Serve the page of a studio in this block; yields its URL.

    port: a free one. All files that are received and made lie in a temporary folder, and no others are served. Nothing
    is sent to or fetched from other hosts.
    """
    with temporary_folder() as folder:
        page = build_page(studio)
        page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
        try:
            _, url, _ = page.launch(
                server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
                inbrowser=False, ssr_mode=False, enable_monitoring=False, run_history=False, footer_links=[],
                pwa=False, mcp_server=False, allowed_paths=[folder], max_file_size=MAX_UPLOAD,
                state_session_capacity=MAX_SESSIONS, strict_cors=True,
                app_kwargs={"middleware": [Middleware(RefuseForeignFiles)]}, **page_style(),
            )  # fmt: skip
            yield url
        finally:
            studio.cancel_jobs()
            page.close(verbose=False)


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Give gradio a new temporary folder in this block, and remove it."""
    before = os.environ.get(TEMPORARY_FOLDER)
    with tempfile.TemporaryDirectory(prefix="relay-diffusion-app-", ignore_cleanup_errors=True) as folder:
        os.environ[TEMPORARY_FOLDER] = os.path.realpath(folder)
        try:
            yield os.environ[TEMPORARY_FOLDER]
        finally:
            if before is None:
                del os.environ[TEMPORARY_FOLDER]
            else:
                os.environ[TEMPORARY_FOLDER] = before
