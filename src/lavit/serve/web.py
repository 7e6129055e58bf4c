"""The page of `lavit serve --web`: ask, draw and edit, see the tokens. Its work is that of clients.

Requests of the page go through the same session, painter and limits as those of the API. Pictures
enter by `SentPictures` alone: Gradio hands on the path of an upload, unread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio import processing_utils
from PIL import Image

from lavit.generate.pipeline import Pipeline
from lavit.serve.chat import order_of
from lavit.serve.errors import ApiError
from lavit.serve.gate import PAGE, is_key
from lavit.serve.images import drawing_of
from lavit.serve.service import Service, seed_or_new
from lavit.serve.ticket import Order
from lavit.visualize import token_maps

PREVIEWS = 6  # of a picture on its way
HOUR = 3600  # seconds; uploads and pictures shown are deleted after one
FILLED = ".filled img { width: 100%; height: 100%; object-fit: contain; }"
CANVAS = """
<canvas width="320" height="320" tabindex="0" role="img" aria-label="Canvas. Draw with the pointer,
or with the arrow keys; space makes a dot, delete clears."></canvas>
<div>
<label>Colour <input type="color" name="colour" value="#3465a4"></label>
<label>Width <input type="range" name="width" min="2" max="64" value="16"></label>
<button type="button">Clear</button>
<label>Picture <input type="file" accept="image/*"></label>
</div>
"""
CANVAS_CSS = """
canvas { width: 100%; max-width: 320px; aspect-ratio: 1; touch-action: none; cursor: crosshair;
    border: 1px solid var(--border-color-primary); border-radius: 4px; background: white; }
canvas:focus-visible, button:focus-visible { outline: 2px solid var(--color-accent); }
div { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; margin-top: 8px; }
label { display: flex; gap: 6px; align-items: center; color: var(--body-text-color); }
button { padding: 4px 12px; border: 1px solid var(--border-color-primary); border-radius: 4px;
    color: var(--body-text-color); background: var(--button-secondary-background-fill); }
input[type="range"] { width: 110px; } input[type="file"] { max-width: 200px; }
"""


def add_page(app: FastAPI, service: Service, keys: Sequence[str]) -> None:
    """Put the page at /web of an application; with keys, one of them is its password."""

    async def refuse(*_: Any, **__: Any) -> None:
        raise gr.Error("this server fetches no pictures: upload them")

    processing_utils.async_ssrf_protected_get = refuse  # Gradio would fetch any public address

    def allowed(_: str, password: str) -> bool:
        return is_key(password.strip().encode(), keys)

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    gr.mount_gradio_app(
        app,
        blocks_of(service),
        path=PAGE,
        auth=allowed if keys else None,
        auth_message="Any name, and a key of this server as the password." if keys else None,
        theme=gr.themes.Default(**fonts),  # no fonts from elsewhere
        css=FILLED,
        max_file_size=service.limits.request_bytes,
        show_error=False,  # else the text of any exception is shown
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )


def blocks_of(service: Service) -> gr.Blocks:
    """The page, unmounted."""
    waiting = service.limits.requests
    picture = partial(gr.Image, type="filepath", image_mode=None, height=300)
    picture = partial(picture, sources=["upload", "clipboard"], buttons=["download", "fullscreen"])
    shown = partial(
        gr.Image, interactive=False, format="png", height=340, elem_classes="filled", min_width=280
    )
    shown = partial(shown, buttons=["download"])
    title = f"LaVIT: {service.name}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(HOUR, HOUR)) as blocks:
        gr.Markdown(f"# {title}")
        with gr.Tab("Ask"), gr.Row():
            with gr.Column():
                seen = picture(label="Picture")
                question = gr.Textbox(label="Question", info="Empty: the picture is described.")
                with gr.Row():
                    ask = gr.Button("Answer", variant="primary")
                    ask_stop = gr.Button("Stop")
            with gr.Column():
                answer = gr.Textbox(label="Answer", lines=4, interactive=False)
                ask_note = gr.Markdown()
        with gr.Tab("Draw"), gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt", info="What to draw, or what to change.")
                source = picture(label="Picture to edit (optional)")
                seed = gr.Number(-1, label="Seed", info="-1: another each time.", precision=0)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary")
                    draw_stop = gr.Button("Stop")
            with gr.Column():
                drawn = shown(label="Drawing")
                draw_note = gr.Markdown()
                again = gr.Button("Edit this drawing")
        with gr.Tab("Tokens"):
            see_note = gr.Markdown("Draw: the more there is to see, the more tokens it takes.")
            with gr.Row():
                with gr.Column(min_width=280):
                    canvas = gr.HTML(
                        html_template=CANVAS, css_template=CANVAS_CSS, js_on_load=_script(),
                        apply_default_css=False,
                    )  # fmt: skip
                kept = shown(label="Kept patches")
                merged = shown(label="Where the dropped ones flow")
        verbs = _Verbs(service)
        quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": waiting}
        asking = gr.on([ask.click, question.submit], verbs.answer, [seen, question],
                       [answer, ask_note], **quiet)  # fmt: skip
        ask_stop.click(None, cancels=asking)
        drawing = gr.on([draw.click, prompt.submit], verbs.draw, [prompt, source, seed],
                        [drawn, draw_note], **quiet)  # fmt: skip
        draw_stop.click(None, cancels=drawing)
        again.click(lambda picture: picture, drawn, source)
        canvas.input(verbs.see, None, [kept, merged, see_note], trigger_mode="always_last", **quiet)
    return blocks.queue(max_size=waiting)


def _script() -> str:
    return Path(__file__).with_name("canvas.js").read_text()


@contextmanager
def _told(service: Service) -> Iterator[None]:
    """What goes wrong is said as it is to other clients."""
    try:
        yield
    except Exception as error:
        raise gr.Error(service.error(error).message, print_exception=False) from error


class _Verbs:
    """What the page's buttons do; each gives values of components, and closes its ticket."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def answer(self, file: str | None, question: str) -> AsyncIterator[tuple[str, str]]:
        """The answer so far, and tokens."""
        with _told(self.service):
            if file is None:
                raise ApiError(400, "choose a picture first")
            self.service.check_words([question], "question")
            content = [{"type": "image", "image": await self._opened(file)}]
            content += [{"type": "text", "text": question}] if question.strip() else []
            order = order_of([{"role": "user", "content": content}], "text", seed=0)
            ticket, size = await self.service.open(order)
            note = f"The picture takes {size.image} of {self._patches} tokens."
            try:
                text = ""
                async for update in ticket:
                    text += update.text
                    yield text, note
            finally:
                ticket.close()

    async def draw(
        self, prompt: str, file: str | None, seed: int | None
    ) -> AsyncIterator[tuple[Image.Image | None, str]]:
        """The picture as it comes out of the noise, and what is known of it."""
        with _told(self.service):
            self.service.check_words([prompt], "prompt")
            pictures = [] if file is None else [await self._opened(file)]
            seed = seed_or_new(None if seed is None or seed < 0 else seed)
            make = drawing_of(prompt, pictures, seed=seed)
            previews = 0 if self.service.pipeline.release.checker is not None else PREVIEWS
            ticket, _ = await self.service.open(Order(make, previews=previews))
            try:
                yield None, "Writing tokens …"
                async for update in ticket:
                    note = f"{len(update.codes)} of {self._patches} tokens, seed {seed}."
                    if update.kind == "image" and update.picture is None:
                        yield None, f"Painting from {note}"
                    elif update.picture is not None:
                        done = "Drawn" if update.kind == "image" else "Painting"
                        yield update.picture, f"{done} from {note}"
            finally:
                ticket.close()

    async def see(self, event: gr.EventData) -> tuple[Image.Image, Image.Image, str]:
        """Kept patches, merge map and the number of tokens of what is drawn."""
        with _told(self.service):
            address = event._data.get("drawn")
            if not isinstance(address, str):
                raise ApiError(400, "nothing is drawn")
            picture = await self.service.pictures.sent(address)

            def look(pipe: Pipeline) -> tuple[tuple[Image.Image, Image.Image], int]:
                keep = pipe.tokenize(picture).keep
                return token_maps(pipe.model, picture, keep), int(keep.sum())

            (kept, merged), count = await self.service.worker.call(look)
            return kept, merged, f"**{count}** of {self._patches} patches are kept."

    @property
    def _patches(self) -> int:
        return self.service.pipeline.model.config.vision.patches

    async def _opened(self, file: str) -> Image.Image:
        """An upload, through the border for pictures."""
        return await self.service.pictures.sent(await asyncio.to_thread(Path(file).read_bytes))
