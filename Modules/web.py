"""The page, and the same answers for other programs: predict.py --serve.

    curl -F file=@lesion.jpg http://127.0.0.1:7860/predict      # one picture -> a row of predictions.jsonl
    curl http://127.0.0.1:7860/healthz                          # {"status": "ok"}

Pictures stay on this machine: no request leaves for another host, nothing is logged, and an upload is deleted once it
is answered. One picture is judged at a time; the others queue.
"""

import asyncio
import base64
import io
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import h11
import jinja2
import numpy as np
import uvicorn
from fastapi import FastAPI, UploadFile
from fastapi.responses import JSONResponse
from starlette.formparsers import MultiPartException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from Modules import predictions
from Modules.cli import UserError
from Modules.data.images import EXTENSIONS, ImageError, decode, encode_jpeg, resize
from Modules.data.synthetic import draw
from Modules.evaluation import evidence, explanation, gallery

BYTES = 20 * 2**20  # of one picture
FILES = 20  # pictures dropped at once
FORM = 2**16  # bytes that a form adds to the file in it
REST = 2**20  # bytes of any other body
CONNECTIONS = 100  # at once
HEADERS_WITHIN, BODY_WITHIN = 10, 120  # seconds that a client has to send them
EXAMPLES = {"Drawn example: benign": (1, False), "Drawn example: malignant": (3, True)}  # seed and class
PATIENCE = 600  # seconds after which an upload that nobody asked about is deleted; it may take as long again
# Gradio writes its settings, scripts and styles into the page itself; nothing is taken from another host.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PAGE = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
)

# The picture as the model sees it, and heat maps where they were asked for and there is a probability.
Answer = tuple[np.ndarray, evidence.Evidence, np.ndarray | None]
Ask = Callable[[bytes, bool], Answer]


def serve(checkpoint: evidence.Checkpoint, k: int, host: str, port: int) -> None:
    """Serve the page until interrupted.

    Raises:
        UserError: the address can't be listened on.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        problem = error.strerror or error
        raise UserError(f"can't listen on {host}:{port} ({problem}): choose another --port or --host") from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the uploads go, too
    with listener, tempfile.TemporaryDirectory() as uploads:
        app = build(checkpoint, k, host, Path(uploads))
        threading.Thread(target=keep_swept, args=(Path(uploads),), daemon=True).start()
        name = "localhost" if host in ("", "0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listener.getsockname()[1]}"
        print(f"{address} is ready; Ctrl-C stops it.", flush=True)
        uvicorn.Server(settings(app)).run(sockets=[listener])


class Deadline(H11Protocol):
    """Hangs up on a client that does not get to the end of its headers, of which uvicorn knows no limit."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.keep_time()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.keep_time()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self.timer:
            self.timer.cancel()

    def keep_time(self) -> None:
        """The time runs while no request is being answered, however often a few more bytes arrive."""
        if self.conn.their_state is h11.IDLE or (self.cycle is not None and self.cycle.response_complete):
            self.timer = self.timer or self.loop.call_later(HEADERS_WITHIN, self.transport.close)
        elif self.timer:
            self.timer.cancel()
            self.timer = None


def settings(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves the application: with an end to the clients it takes and to the time they have."""
    return uvicorn.Config(
        app, http=Deadline, ws="none", limit_concurrency=CONNECTIONS, access_log=False, log_level="error"
    )


def keep_swept(folder: Path) -> None:
    while True:
        time.sleep(PATIENCE)
        sweep(folder, PATIENCE)


def sweep(folder: Path, age: float) -> None:
    """Delete all in `folder` that has been there for more than `age` seconds.

    Gradio's `delete_cache` knows whole uploads alone, not the empty file that its File component makes of each.
    """
    for path in sorted(folder.rglob("*"), reverse=True):  # files before their folder
        with suppress(OSError):  # answered, and gone, meanwhile
            if time.time() - path.stat().st_ctime > age:
                path.rmdir() if path.is_dir() else path.unlink()


def build(checkpoint: evidence.Checkpoint, k: int, host: str, uploads: Path) -> FastAPI:
    """The application: the page at /, POST /predict, GET /healthz. Uploads lie in `uploads` until they are answered."""
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(uploads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    import gradio  # reads the above when it is loaded

    ask = asker(checkpoint, k)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(guarded)
    if host in ("127.0.0.1", "localhost", "::1"):  # a page elsewhere whose name leads here must not get at it
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])

    @app.get("/healthz")
    def healthz() -> dict:
        return {"status": "ok"}

    @app.post("/predict")
    def predict(file: UploadFile) -> JSONResponse:
        name = file.filename or ""
        try:
            found, status = ask(file.file.read(BYTES + 1), False)[1], 200
        except ImageError as error:
            found, status = error, 422
        return JSONResponse(predictions.row(name, found, checkpoint.threshold), status)

    # Named fonts would be asked for at Google.
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    return gradio.mount_gradio_app(
        app,
        page(checkpoint, ask),
        "/",
        max_file_size=BYTES,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=gradio.themes.Base(**fonts),
        css_paths=Path(__file__).parent / "templates" / "page.css",
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )


def asker(checkpoint: evidence.Checkpoint, k: int) -> Ask:
    """A function that answers one picture after the other, with or without heat maps. It raises ImageError."""
    turn = threading.Lock()

    def ask(data: bytes, explained: bool) -> Answer:
        if len(data) > BYTES:
            raise ImageError(f"over {BYTES // 2**20} MB")
        with turn:  # one at a time also while decoding: a large picture takes a lot of memory
            picture = resize(decode(data), checkpoint.size)
            found = evidence.judge(checkpoint, picture[None], k)[0]
            return picture, found, explanation.explain(checkpoint, picture, found) if explained else None

    ask(drawn(*next(iter(EXAMPLES.values())), checkpoint.size), True)  # the first takes seconds
    return ask


def page(checkpoint: evidence.Checkpoint, ask: Ask):
    """The Gradio page."""
    import gradio

    def answer(files: list[str] | None) -> tuple[None, str]:
        try:
            if len(files or ()) > FILES:
                raise gradio.Error(f"{len(files)} pictures; at most {FILES} at once")
            return None, report([(Path(file).name, Path(file).read_bytes()) for file in files or ()], checkpoint, ask)
        finally:
            for file in files or ():
                Path(file).unlink(missing_ok=True)

    def example(name: str) -> str:
        return report([(name, drawn(*EXAMPLES[name], checkpoint.size))], checkpoint, ask)

    with gradio.Blocks(title="Melanoma classifier", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# Is it a melanoma?\n\n**{evidence.NOTICE}**", elem_id="notice")
        dropped = gradio.File(
            label=f"Up to {FILES} pictures of {BYTES // 2**20} MB",
            file_count="multiple",
            file_types=list(EXTENSIONS),
            height=160,
            elem_id="pictures",
        )
        with gradio.Row():
            buttons = {name: gradio.Button(name, min_width=120) for name in EXAMPLES}
        # Not gradio.HTML, which evaluates text as a program: the policy forbids that. Our template escapes by itself.
        result = gradio.Markdown(sanitize_html=False, latex_delimiters=[], elem_id="result")
        private = {"api_visibility": "private", "concurrency_id": "model", "concurrency_limit": 1}
        dropped.upload(answer, dropped, [dropped, result], **private)
        for name, button in buttons.items():
            button.click(lambda name=name: example(name), None, result, **private)
    return blocks.queue(api_open=False)


def drawn(seed: int, malignant: bool, size: int) -> bytes:
    """A synthetic example as a JPEG: no real picture is part of the program."""
    return encode_jpeg(draw(np.random.default_rng(seed), malignant, size)[0])


def report(named: list[tuple[str, bytes]], checkpoint: evidence.Checkpoint, ask: Ask) -> str:
    """HTML on all pictures: what is said about each, and one table to download."""
    rows, cards = [], []
    for name, data in named:
        try:
            picture, found, heats = ask(data, True)
        except ImageError as error:
            rows.append(predictions.row(name, error, checkpoint.threshold))
            cards.append({"row": rows[-1]})
            continue
        rows.append(predictions.row(name, found, checkpoint.threshold))
        cards.append(
            {
                "row": rows[-1],
                "words": evidence.in_words(found, checkpoint),
                "picture": _jpeg(picture),
                "caption": "" if heats is None else explanation.caption(heats),
                "heats": [] if heats is None else [_jpeg(explanation.overlay(picture, heat)) for heat in heats],
                "neighbours": [
                    {"known": one, "thumbnail": _uri("image/jpeg", gallery.thumbnail(checkpoint.gallery, one.position))}
                    for one in found.neighbours
                ],
            }
        )
    table = io.StringIO()
    list(predictions.write_csv(table, rows))
    html = PAGE.get_template("report.html").render(
        cards=cards,
        table=_uri("text/csv", table.getvalue().encode(errors="replace")),
        checkpoint=checkpoint,
    )
    return " ".join(html.split())  # on one line, or Markdown would look into it


def _jpeg(picture: np.ndarray) -> str:
    return _uri("image/jpeg", encode_jpeg(picture))


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def guarded(app: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Middleware: HEADERS on every answer, 413 for a body over the limit before it is read, an end to a slow one."""

    async def call(scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        path = scope["path"]
        to_page = path.endswith("/upload")
        limit = FORM + BYTES if path == "/predict" else FORM + FILES * BYTES if to_page else REST
        end = asyncio.get_running_loop().time() + BODY_WITHIN
        read, whole, cut = 0, False, False

        async def counted() -> dict:
            nonlocal read, whole, cut
            try:
                async with asyncio.timeout_at(None if whole else end):  # after the body it waits for the client to go
                    message = await receive()
            except TimeoutError:
                message = {"type": "http.disconnect"}
                cut = True
            read += len(message.get("body", b""))
            cut = cut or read > limit
            gone = cut or message["type"] == "http.disconnect"
            if gone and to_page and not whole:  # Gradio deletes the part that is there for this error alone
                raise MultiPartException("the upload did not come to its end")
            whole = whole or not message.get("more_body", False)
            return {"type": "http.disconnect"} if cut else message

        async def with_headers(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    *([(b"connection", b"close")] if cut else ()),
                    *((name.lower().encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            answer = JSONResponse({"error": f"over {BYTES // 2**20} MB"}, 413)
            await answer(scope, receive, with_headers)
            return
        await app(scope, counted, with_headers)

    return call
