"""Commands that generate text: chat, generate, compare-outputs."""

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

Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="Adapter folder. Default: the base alone.")
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base", help="Name or folder. Default: the adapter's base, else the embedded model."
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Precision = Annotated[str, typer.Option("--precision", help="auto, fp32, bf16 or fp16.")]
MaxNew = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Maximum length of a reply in tokens.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0, help="Sampling temperature; 0: greedy.")
]
TopP = Annotated[
    float, typer.Option("--top-p", min=0, max=1, help="Nucleus sampling; 1: all tokens.")
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Top-k sampling; 0: all tokens.")]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", min=0.01, help="Above 1: fewer repetitions.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="Text that ends a reply; repeatable.")
]


def chat(
    adapter: Adapter = None,
    base: BaseModel = None,
    system: Annotated[
        str, typer.Option("--system", help="System prompt, if the template supports one.")
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
    """Chat with a model in the terminal.

    Prompts use the template of the training. Ctrl-C stops a reply; an empty line, /quit or Ctrl-D
    ends the program; /new starts a new conversation; /help lists the commands.
    """
    from slm_lora.data.text import prompt_text
    from slm_lora.errors import SlmLoraError
    from slm_lora.evaluation.generation import Sampling
    from slm_lora.records import Turn

    system = prompt_text(system, "--system")
    _check_stop_texts(stop)
    variants = load_models(base, [adapter] if adapter else [], device, precision)
    name = variants.names[-1]
    row_tokenizer = variants.row_tokenizers[name]
    sampling = Sampling(
        max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, tuple(stop or ())
    )
    first_turns = [Turn("system", system)] if system else []
    # Fail now if the template has no system turn.
    row_tokenizer.prompt([*first_turns, Turn("user", "?")])
    is_multi_turn = row_tokenizer.is_multi_turn
    out = console()
    out.print(
        f"{variants.base.source.name} · {name} · template {row_tokenizer.template.kind}"
        + ("" if is_multi_turn else " (single questions: its training had no conversations)"),
        soft_wrap=True,
    )
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Invalid bytes become lone surrogates, which are reported below.
        sys.stdin.reconfigure(errors="surrogateescape")
    turns = list(first_turns)
    while (question := _read_question()) is not None:
        # A question may begin with a path such as /etc/hosts.
        if re.fullmatch(r"/[A-Za-z?_-]+", first_word := question.split()[0]):
            if first_word in ("/quit", "/exit", "/bye"):
                break
            turns = list(first_turns) if first_word == "/new" else turns
            unknown = f"{first_word}: unknown command, not sent; {_HELP}"
            out.print(_COMMANDS.get(first_word, unknown))
            continue
        if not is_multi_turn:
            turns = list(first_turns)
        try:
            turns.append(Turn("user", prompt_text(question, "the question")))
        except SlmLoraError as error:
            print(error)
            continue
        reply = _print_reply(variants, name, turns, sampling)
        turns.append(Turn("assistant", reply))


_HELP = (
    "/new starts a new conversation, /help shows this, /quit or an empty line ends the program, "
    "Ctrl-C stops a reply"
)
_COMMANDS = {"/help": _HELP, "/?": _HELP, "/new": "new conversation"}


def _read_question() -> str | None:
    """Read the next question; None at the end of the input."""
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        except UnicodeDecodeError as error:
            print(f"not valid {error.encoding} text, not sent")
            continue
        return question or None


def _print_reply(variants: Any, name: str, turns: list[Any], sampling: Any) -> str:
    """Print a reply as it is generated; return its text, up to its end or Ctrl-C."""
    from slm_lora.evaluation.generation import Generation

    text = ""
    try:
        prompt = variants.row_tokenizers[name].prompt(turns)
        generation = Generation(variants, name, prompt, sampling)
        for piece in generation.pieces():
            text += piece
            print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except (UsageError, DataError) as error:  # e.g. the conversation is too long
        print(error, end="")
    print()
    return text


def generate(
    prompt: Annotated[str | None, typer.Argument(help="A prompt; or use --prompts.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="File: text, one prompt per line, or JSON lines."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Output file (JSON lines). Default: the terminal.")
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
    """Generate replies to one prompt or a file of prompts."""
    import json

    from slm_lora.data.prompts import Prompt, read_prompts
    from slm_lora.data.text import prompt_text
    from slm_lora.evaluation.batched_generation import generate_replies
    from slm_lora.evaluation.generation import Generation, Sampling, prompt_ids
    from slm_lora.records import Turn
    from slm_lora.runtime.progress import Reporter
    from slm_lora.runtime.storage import atomic_write_text

    if (prompt is None) == (prompts is None):
        raise UsageError("generate: give either a prompt or --prompts FILE")
    if prompt is not None and not prompt.strip():
        raise UsageError("prompt: empty; give a text")
    _check_stop_texts(stop)
    questions = read_prompts(prompts) if prompts else []
    if prompt is not None:
        questions = [Prompt((Turn("user", prompt_text(prompt, "prompt")),))]
    variants = load_models(base, [adapter] if adapter else [], device, precision)
    name = variants.names[-1]
    _warn_unused_contexts(questions, variants.row_tokenizers[name].template)
    sampling = Sampling(
        max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, tuple(stop or ())
    )
    if prompts is None:
        generation = Generation(variants, name, prompt_ids(variants, name, questions[0]), sampling)
        for piece in generation.pieces():
            print(printable(piece), end="", flush=True)
        print()
        return
    prompts_ids = [prompt_ids(variants, name, question) for question in questions]
    with Reporter().task(name, len(questions), "prompts") as task:
        replies = generate_replies(
            variants, name, prompts_ids, sampling, lambda reply: task.advance(1, len(reply.ids))
        )
        task.close(f"answered {len(questions)} prompts")
    answers = [
        {
            "prompt": question.turns[-1].content,
            "response": reply.text,
            "finish_reason": reply.finished,
            "tokens": len(reply.ids),
        }
        for question, reply in zip(questions, replies, strict=True)
    ]
    output = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    if out is None:
        print(output, end="")
    else:
        atomic_write_text(out, output)
        console().print(f"{out}", soft_wrap=True)


def compare_outputs(
    prompts: Annotated[Path, typer.Argument(help="File of prompts, as for generate.")],
    adapters: Annotated[
        list[Path] | None, typer.Option("--adapter", help="Adapter folder; repeatable.")
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", help="Output file: .md, .html or .json; repeatable."),
    ] = None,
    base: BaseModel = None,
    max_new_tokens: MaxNew = 96,
    sampled: Annotated[bool, typer.Option(help="Also generate a sampled answer per model.")] = True,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Compare answers of a base and its adapters.

    All answer the same prompts, greedily and sampled. If the file has reference answers, their loss
    is shown for each model.
    """
    from slm_lora.data.prompts import read_prompts
    from slm_lora.evaluation import compare_outputs as comparing
    from slm_lora.evaluation.generation import Sampling
    from slm_lora.report import outputs
    from slm_lora.report.html import as_html
    from slm_lora.report.markdown import as_markdown
    from slm_lora.runs.folder import to_json
    from slm_lora.runtime.progress import Reporter
    from slm_lora.runtime.storage import atomic_write_text

    if unsupported := [path for path in out or [] if path.suffix not in (".md", ".html", ".json")]:
        raise UsageError(f"--out {unsupported[0]}: unknown format; use .md, .html or .json")
    questions = read_prompts(prompts)
    variants = load_models(base, adapters or [], device, precision)
    _warn_unused_contexts(
        questions, variants.row_tokenizers[variants.names[min(1, len(variants.names) - 1)]].template
    )
    greedy = Sampling(max_new_tokens)
    stochastic = Sampling(max_new_tokens, temperature, top_p, seed=seed) if sampled else None
    n_answers = len(questions) * len(variants.names) * (1 + sampled)
    with Reporter().task("answers", n_answers, "answers") as task:
        comparisons = comparing.compare_outputs(
            variants, questions, greedy, stochastic, lambda tokens: task.advance(1, tokens)
        )
        task.close(f"{n_answers} answers")
    sections = outputs.sections(comparisons)
    title = f"{variants.base.source.name}: outputs side by side"
    settings = {
        "max_new_tokens": max_new_tokens,
        "sampled": {"temperature": temperature, "top_p": top_p, "seed": seed} if sampled else None,
    }
    for path in out or []:
        content = {
            ".md": lambda: as_markdown(title, "", None, None, sections),
            ".html": lambda: as_html(title, "", None, None, sections),
            ".json": lambda: to_json(comparing.record(comparisons, variants, settings)),
        }[path.suffix]()
        atomic_write_text(path, content)
    _print_columns(comparisons)
    for path in out or []:
        console().print(f"{path}", soft_wrap=True)


def _print_columns(comparisons: list[Any]) -> None:
    """Print answers in as many columns as fit; further ones below."""
    from rich.console import Console
    from rich.table import Table

    terminal = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 140)
    n_columns = max(1, terminal.width // 36)
    for number, comparison in enumerate(comparisons, 1):
        terminal.print(f"\n{number}. {printable(comparison.prompt)}", style="bold")
        for start in range(0, len(comparison.answers), n_columns):
            answers = comparison.answers[start : start + n_columns]
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
            for answer in answers:
                loss = "" if answer.loss is None else f"  loss {answer.loss:.3f}"
                table.add_column(f"{answer.variant}{loss}", ratio=1)
            table.add_row(*(printable(answer.greedy) for answer in answers))
            if any(answer.sampled for answer in answers):
                table.add_row()
                table.add_row(*(f"sampled: {printable(answer.sampled)}" for answer in answers))
            terminal.print(table)


def load_models(base: str | None, adapters: list[Path], device: str, precision: str) -> Any:
    """Load a base and its adapters, and print their notes.

    Raises:
        UsageError: an unknown device or precision, or a model that cannot be loaded.
    """
    from slm_lora.adapters.multi import load_adapter_set
    from slm_lora.runtime.progress import Reporter

    quiet_libraries()
    _check_choice("--device", device, ("auto", "cpu", "cuda", "mps"))
    _check_choice("--precision", precision, ("auto", "fp32", "bf16", "fp16"))
    reporter = Reporter()
    # Loading may take a minute.
    adapter_names = ", ".join(folder.resolve().name for folder in adapters)
    reporter.info(
        f"  loading {base or ('the base' if adapters else 'the embedded model')}"
        + (f" and {adapter_names}" if adapter_names else "")
    )
    variants = load_adapter_set(base, adapters, device=device, precision=precision)
    for note in variants.notes:
        reporter.info(f"note: {note}")
    return variants


def _check_stop_texts(stop: list[str] | None) -> None:
    from slm_lora.data.text import prompt_text

    for text in stop or ():
        prompt_text(text, "--stop")


def _warn_unused_contexts(questions: list[Any], template: Any) -> None:
    """Print a note if prompts have contexts and the template has no place for them."""
    from slm_lora.runtime.progress import Reporter

    n_contexts = sum(bool(question.context.strip()) for question in questions)
    if n_contexts and (not template.include_context or template.kind == "plain"):
        Reporter().info(
            f"note: {n_contexts} of {len(questions)} prompts have a context, which is ignored: the "
            f"template ({template.kind}) does not include it"
        )


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option} {value}: unknown; use one of {', '.join(choices)}")
