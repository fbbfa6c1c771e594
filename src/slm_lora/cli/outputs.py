"""Commands that let a model speak: chat, generate, compare-outputs."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slm_lora.cli.options import console, quiet_libraries
from slm_lora.errors import DataError, UsageError
from slm_lora.runtime.terminal import printable

Adapter = Annotated[Path | None, typer.Option("--adapter", help="Adapter folder; else the base.")]
BaseModel = Annotated[
    str | None,
    typer.Option("--base", help="Model name or folder; else the one the adapter names."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Precision = Annotated[str, typer.Option("--precision", help="auto, fp32, bf16 or fp16.")]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest reply, in tokens.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0, help="0: always the most likely token.")
]
TopP = Annotated[float, typer.Option("--top-p", min=0, max=1, help="Nucleus sampling.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw among the k likeliest; 0: all.")]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", min=0.01, help="Above 1: fewer repetitions.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="Text that ends a reply; may be repeated.")
]


def chat(
    adapter: Adapter = None,
    base: BaseModel = None,
    system: Annotated[
        str, typer.Option("--system", help="System prompt, where the template has one.")
    ] = "",
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Talk to a model in the terminal, prompted exactly as it was trained.

    Ctrl-C stops a reply, not the program; an empty line, /quit or Ctrl-D ends it; /new begins
    anew; /help lists what there is.
    """
    from slm_lora.data.text import prompt_text
    from slm_lora.errors import SlmLoraError
    from slm_lora.evaluation.generation import Sampling
    from slm_lora.records import Turn

    system = prompt_text(system, "--system")
    _check_stop(stop)
    variants = opened(base, [adapter] if adapter else [], device, precision)
    name = variants.names[-1]
    prompter = variants.row_tokenizers[name]
    sampling = Sampling(
        max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, tuple(stop or ())
    )
    beginning = [Turn("system", system)] if system else []
    prompter.prompt([*beginning, Turn("user", "?")])  # refuses what the template has no place for
    several = prompter.is_multi_turn
    out = console()
    out.print(
        f"{variants.base.source.name} · {name} · template {prompter.template.kind}"
        + ("" if several else " (one question at a time: it was trained on no more)"),
        soft_wrap=True,
    )
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is told, and refused
    turns = list(beginning)
    while (asked := _asked()) is not None:
        # (A question may begin with a path, or with a comment's strokes.)
        if re.fullmatch(r"/[A-Za-z?_-]+", word := asked.split()[0]):
            if word in ("/quit", "/exit", "/bye"):
                break
            turns = list(beginning) if word == "/new" else turns
            out.print(_COMMANDS.get(word, f"{word}: no command, and not sent; {_HELP}"))
            continue
        if not several:
            turns = list(beginning)
        try:
            turns.append(Turn("user", prompt_text(asked, "the question")))
        except SlmLoraError as error:
            print(error)
            continue
        said = _streamed(variants, name, turns, sampling)
        turns.append(Turn("assistant", said))


_HELP = (
    "/new starts a new conversation, /help shows this, /quit or an empty line ends, Ctrl-C stops "
    "a reply"
)
_COMMANDS = {"/help": _HELP, "/?": _HELP, "/new": "new conversation"}


def _asked() -> str | None:
    """The next question; None at the end."""
    while True:
        try:
            asked = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        except UnicodeDecodeError as error:
            print(f"not text in {error.encoding}, and not sent")
            continue
        return asked or None


def _streamed(variants: Any, name: str, turns: list[Any], sampling: Any) -> str:
    """Print a reply as it comes; what was said until its end or Ctrl-C."""
    from slm_lora.evaluation.generation import Generation

    said = ""
    try:
        reply = Generation(variants, name, variants.row_tokenizers[name].prompt(turns), sampling)
        for piece in reply.pieces():
            said += piece
            print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except (UsageError, DataError) as error:  # the conversation has grown too long, say
        print(error, end="")
    print()
    return said


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; or --prompts.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="File: text, a prompt a line, or JSON lines.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="JSON lines to write; else the terminal.")
    ] = None,
    adapter: Adapter = None,
    base: BaseModel = None,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Answer one prompt, or a file of them."""
    import json

    from slm_lora.data.prompts import Prompt, read_prompts
    from slm_lora.data.text import prompt_text
    from slm_lora.evaluation.generation import Generation, Sampling, prompt_ids
    from slm_lora.records import Turn
    from slm_lora.runtime.progress import Reporter
    from slm_lora.runtime.storage import atomic_write_text

    if (prompt is None) == (prompts is None):
        raise UsageError("give one prompt, or a file of them with --prompts")
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty")
    _check_stop(stop)
    asked = read_prompts(prompts) if prompts else []
    if prompt is not None:
        asked = [Prompt((Turn("user", prompt_text(prompt, "prompt")),))]
    variants = opened(base, [adapter] if adapter else [], device, precision)
    name = variants.names[-1]
    _say_contexts(asked, variants.row_tokenizers[name].template)
    sampling = Sampling(
        max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, tuple(stop or ())
    )
    if prompts is None:
        reply = Generation(variants, name, prompt_ids(variants, name, asked[0]), sampling)
        for piece in reply.pieces():
            print(printable(piece), end="", flush=True)
        print()
        return
    lines = []
    with Reporter().task(name, len(asked), "prompts") as task:
        for each in asked:
            reply = Generation(variants, name, prompt_ids(variants, name, each), sampling)
            text = "".join(reply.pieces())
            lines.append(
                {
                    "prompt": each.turns[-1].content,
                    "response": text,
                    "finish_reason": reply.finished,
                    "tokens": len(reply.ids),
                }
            )
            task.advance(1, len(reply.ids))
        task.close(f"answered {len(asked)} prompts")
    written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if out is None:
        print(written, end="")
    else:
        atomic_write_text(out, written)
        console().print(f"{out}", soft_wrap=True)


def compare_outputs(
    prompts: Annotated[Path, typer.Argument(help="File of prompts, as for generate.")],
    adapters: Annotated[
        list[Path] | None, typer.Option("--adapter", help="Adapter folder; may be repeated.")
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", help="File to write: .md, .html or .json; may be repeated."),
    ] = None,
    base: BaseModel = None,
    max_new_tokens: MaxNew = 96,
    sampled: Annotated[bool, typer.Option(help="Also a sampled answer of each.")] = True,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Ask the base and adapters the same prompts: answers side by side, greedy and sampled, with
    the loss of the reference answer where the file has one."""
    from slm_lora.data.prompts import read_prompts
    from slm_lora.evaluation import compare_outputs as comparing
    from slm_lora.evaluation.generation import Sampling
    from slm_lora.report import outputs
    from slm_lora.report.html import as_html
    from slm_lora.report.markdown import as_markdown
    from slm_lora.runs.folder import to_json
    from slm_lora.runtime.progress import Reporter
    from slm_lora.runtime.storage import atomic_write_text

    if wrong := [path for path in out or [] if path.suffix not in (".md", ".html", ".json")]:
        raise UsageError(f"--out {wrong[0]}: ends in none of .md, .html, .json")
    asked = read_prompts(prompts)
    variants = opened(base, adapters or [], device, precision)
    _say_contexts(
        asked, variants.row_tokenizers[variants.names[min(1, len(variants.names) - 1)]].template
    )
    greedy = Sampling(max_new_tokens)
    drawn = Sampling(max_new_tokens, temperature, top_p, seed=seed) if sampled else None
    many = len(asked) * len(variants.names) * (1 + sampled)
    with Reporter().task("answers", many, "answers") as task:
        found = comparing.compare_outputs(
            variants, asked, greedy, drawn, lambda tokens: task.advance(1, tokens)
        )
        task.close(f"{many} answers")
    sections = outputs.sections(found)
    title = f"{variants.base.source.name}: outputs side by side"
    about = {
        "max_new_tokens": max_new_tokens,
        "sampled": {"temperature": temperature, "top_p": top_p, "seed": seed} if sampled else None,
    }
    for path in out or []:
        written = {
            ".md": lambda: as_markdown(title, "", None, None, sections),
            ".html": lambda: as_html(title, "", None, None, sections),
            ".json": lambda: to_json(comparing.record(found, variants, about)),
        }[path.suffix]()
        atomic_write_text(path, written)
    _print_side_by_side(found)
    for path in out or []:
        console().print(f"{path}", soft_wrap=True)


def _print_side_by_side(found: list[Any]) -> None:
    """Columns on a terminal, as many as fit; the rest below them."""
    from rich.console import Console
    from rich.table import Table

    shown = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140)
    fitting = max(1, shown.width // 36)
    for number, each in enumerate(found, 1):
        shown.print(f"\n{number}. {printable(each.prompt)}", style="bold")
        for start in range(0, len(each.answers), fitting):
            some = each.answers[start : start + fitting]
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
            for answer in some:
                loss = "" if answer.loss is None else f"  loss {answer.loss:.3f}"
                table.add_column(f"{answer.variant}{loss}", ratio=1)
            table.add_row(*(printable(answer.greedy) for answer in some))
            if any(answer.sampled for answer in some):
                table.add_row()
                table.add_row(*(f"sampled: {printable(answer.sampled)}" for answer in some))
            shown.print(table)


def opened(base: str | None, adapters: list[Path], device: str, precision: str) -> Any:
    """Load, and say what there is to say."""
    from slm_lora.adapters.multi import load_adapter_set
    from slm_lora.runtime.progress import Reporter

    quiet_libraries()
    _check_choice("--device", device, ("auto", "cpu", "cuda", "mps"))
    _check_choice("--precision", precision, ("auto", "fp32", "bf16", "fp16"))
    reporter = Reporter()
    # Else nothing would be seen for the better part of a minute.
    named = ", ".join(folder.resolve().name for folder in adapters)
    reporter.info(
        f"  loading {base or ('the base' if adapters else 'the embedded model')}"
        + (f" and {named}" if named else "")
    )
    found = load_adapter_set(base, adapters, device=device, precision=precision)
    for note in found.notes:
        reporter.info(f"note: {note}")
    return found


def _check_stop(stop: list[str] | None) -> None:
    from slm_lora.data.text import prompt_text

    for text in stop or ():
        prompt_text(text, "--stop")


def _say_contexts(asked: list[Any], template: Any) -> None:
    """Says that contexts of prompts are left out, where the template has none."""
    from slm_lora.runtime.progress import Reporter

    many = sum(bool(each.context.strip()) for each in asked)
    if many and (not template.include_context or template.kind == "plain"):
        Reporter().info(
            f"note: {many} of {len(asked)} prompts have a context, which is left out: the template "
            f"({template.kind}) puts none in"
        )


def _check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{option} {value}: not one of {', '.join(known)}")
