"""The tools, as agents see them: names, arguments, and answers of a few lines with a small preview."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Sequence
from typing import Annotated, Any

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, ContentBlock, ImageContent, TextContent, ToolAnnotations
from pydantic import Field, ValidationError

from edge_sd import __version__
from edge_sd.errors import EdgeSDError, InvalidRequest, choices

from ..server.failure import describe
from ..server.wish import MAX_REFERENCES, Wish
from .studio import Progress, Studio, preview
from .variants import compared

LOG = logging.getLogger("edge_sd.mcp")
INSTRUCTIONS = (
    "Draws pictures with Stable Diffusion on this machine, without a network. draw and edit answer with the picture's "
    "path, seed and a small preview; ask picture for the full image only if you need its pixels. models lists what is "
    "installed, and the words that a small model knows."
)
# What a single answer may hold of a picture as base64.
MAX_FULL = 20_000_000

Prompt = Annotated[str, Field(description="What to draw. AUTOMATIC1111's language: (word:1.3), [a:b:0.5], AND.")]
Negative = Annotated[str, Field(description="What to lead away from.")]
Model = Annotated[str, Field(description="A name of the tool models, or NAME:VARIANT. Empty: the default.")]
Seed = Annotated[int | None, Field(description="The same seed makes the same picture. None: random.")]
Steps = Annotated[int | None, Field(description="Denoising steps. None: the model's.")]
Count = Annotated[int, Field(ge=1, le=16, description="Pictures, at seed, seed + 1, …")]
References = Annotated[
    list[str] | None,
    Field(max_length=MAX_REFERENCES, description="Pictures that the prompt refers to, if the model takes some."),
]
ReferenceWeight = Annotated[
    float | None, Field(description="How much they count, 0 to 2, in models with an IP-Adapter.", ge=0, le=2)
]
Given = Annotated[str, Field(description="A picture: its name or path in the server's folders, or base64.")]


def make_server(studio: Studio) -> MCPServer[Any]:
    """The server over a studio, which stays the caller's to close."""
    server: MCPServer[Any] = MCPServer(
        "edge-sd", title="edge-sd", version=__version__, instructions=INSTRUCTIONS, log_level="WARNING"
    )
    _add_drawing(server, studio)
    _add_looking(server, studio)
    return server


def _add_drawing(server: MCPServer[Any], studio: Studio) -> None:
    @server.tool(structured_output=False, annotations=ToolAnnotations(destructive_hint=False, open_world_hint=False))
    async def draw(
        context: Context, prompt: Prompt, negative: Negative = "", width: int | None = None, height: int | None = None,
        steps: Steps = None, guidance: float | None = None, seed: Seed = None, sampler: str | None = None,
        count: Count = 1, model: Model = "", preset: str = "exact", references: References = None,
        reference_weight: ReferenceWeight = None,
    ) -> CallToolResult:  # fmt: skip
        """Draw pictures from words. Answers with paths, seeds and a small preview."""
        with _told():
            pictures = [studio.given(each, "reference picture") for each in references or ()]
        wish = _wish(
            studio, model, prompt=prompt, negative=negative, width=width, height=height, steps=steps,
            guidance=guidance, seed=seed, sampler=sampler, count=count, preset=preset, references=pictures,
            reference_weight=reference_weight,
        )  # fmt: skip
        return await _drawn(studio, wish, context)

    @server.tool(structured_output=False, annotations=ToolAnnotations(destructive_hint=False, open_world_hint=False))
    async def edit(
        context: Context, image: Given, prompt: Prompt,
        strength: Annotated[float | None, Field(description="How much is drawn anew, above 0 to 1.")] = None,
        mask: Annotated[str | None, Field(description="White where it is drawn anew: a name, or base64.")] = None,
        negative: Negative = "", steps: Steps = None, seed: Seed = None, count: Count = 1, model: Model = "",
    ) -> CallToolResult:  # fmt: skip
        """Draw a picture anew from another one: all of it, or only where a mask is white. The file itself stays."""
        with _told():
            pictures = {"image": studio.given(image, "image")}
            if mask is not None:
                pictures["mask"] = studio.given(mask, "mask")
        wish = _wish(
            studio, model, prompt=prompt, negative=negative, strength=strength, steps=steps, seed=seed, count=count,
            **pictures,
        )  # fmt: skip
        return await _drawn(studio, wish, context)

    @server.tool(structured_output=False, annotations=ToolAnnotations(destructive_hint=False, open_world_hint=False))
    async def compare(
        context: Context, prompt: Prompt,
        variants: Annotated[list[str] | None, Field(description="Of the model; None: all that run here.")] = None,
        seed: Seed = None, steps: Steps = None, model: Model = "",
    ) -> CallToolResult:  # fmt: skip
        """Draw the same picture with several variants of a model: size, seconds, likeness to the first, side by side.

        The first variant is the reference. For a measurement over many prompts: `edge-sd compare` in a shell.
        """
        with _told():
            rows, images = await compared(studio, prompt, variants, seed, steps, model, _progress(context))
        return _answer(rows, preview(images) if images else None)


def _add_looking(server: MCPServer[Any], studio: Studio) -> None:
    @server.tool(structured_output=False, annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False))
    def models() -> CallToolResult:
        """The models that are installed: variants, default size and steps, and the words that a small one knows."""
        engines = studio.service.engines
        rows = []
        for name in engines.offered:
            with _told():
                bundle = engines.bundle(name)
            words = bundle.root / "words.json"
            row: dict[str, Any] = {
                "name": name, "family": bundle.facts.family, "licence": bundle.facts.license,
                "variants": sorted(bundle.variants), "width": bundle.defaults.width, "height": bundle.defaults.height,
                "steps": bundle.defaults.steps, "guidance": bundle.defaults.guidance,
            }  # fmt: skip
            if words.is_file():
                row |= json.loads(words.read_text("utf-8"))
            rows.append(row)
        return _answer(rows)

    @server.tool(structured_output=False, annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False))
    def picture(
        image: Annotated[str, Field(description="Its name, or its path, as draw answered.")],
        full: Annotated[bool, Field(description="The file itself: some ten thousand tokens and more.")] = False,
    ) -> CallToolResult:
        """How a picture was made, with a small preview; the full image only with `full`."""
        from PIL import Image

        from edge_sd.images.opening import open_picture
        from edge_sd.pipeline.recorded import read_recorded

        with _told():
            path = studio.open(image)
            try:
                made = {name: value for name, value in read_recorded(path).settings.items() if value is not None}
            except InvalidRequest:
                # Nothing is recorded in it.
                made = {}
            opened = open_picture(path, "picture")
            if not full:
                return _answer([{"name": path.name, "path": str(path), "settings": made}], preview([opened]))
            if path.stat().st_size > MAX_FULL:
                raise InvalidRequest(f"{path.name} has more than {MAX_FULL} bytes; read it at its path")
            with Image.open(path) as file:
                kind = str(file.format)
        return _answer([{"name": path.name, "path": str(path), "settings": made}], path.read_bytes(), kind.lower())


async def _drawn(studio: Studio, wish: Wish, context: Context) -> CallToolResult:
    with _told():
        drawn, job = await studio.draw(wish, _progress(context))
    rows = [each.about() for each in drawn]
    for row in rows:
        row["notes"] = job.notes
    return _answer(rows, preview([each.picture.image for each in drawn]))


def _wish(studio: Studio, model: str, **given: Any) -> Wish:
    """A wish of a tool's arguments; `model` may name a variant. Raises ToolError."""
    name, _, variant = model.partition(":")
    with _told():
        if name and name not in studio.service.engines.offered:
            raise InvalidRequest(f"no model {name[:80]!r}; valid: {choices(studio.service.engines.names())}")
        return Wish(model=name, variant=variant or None, **given)


def _progress(context: Context) -> Progress:
    async def tell(share: float, what: str) -> None:
        await context.report_progress(share, 1.0, what)

    return tell


class _told:
    """Errors that an agent can do something about, as the protocol has them: one line, no path, no traceback."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, EdgeSDError | ValidationError):
            raise ToolError(describe(error).message) from None


def _answer(rows: Sequence[dict[str, Any]], image: bytes | None = None, kind: str = "jpeg") -> CallToolResult:
    """Rows as JSON for programs and as text for agents, then the picture."""
    content: list[ContentBlock] = [TextContent(type="text", text=json.dumps(rows, ensure_ascii=False, default=str))]
    if image is not None:
        data = base64.b64encode(image).decode("ascii")
        content.append(ImageContent(type="image", data=data, mime_type=f"image/{kind}"))
    return CallToolResult(content=content)
