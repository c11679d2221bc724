"""The model card: README.md and loss.png, made of measurements alone."""

from __future__ import annotations

import json
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from penstock.core.errors import missing_extra
from penstock.learn.local.corpus import Corpus
from penstock.learn.local.dialogue import conversations
from penstock.learn.local.export import load
from penstock.learn.local.pretrain import Recipe, read_log
from penstock.learn.local.rivals import ngram_bits_per_byte, xz_bits_per_byte
from penstock.learn.local.score import asked, bits_per_byte, complete

PROMPTS = (
    "import os\nimport sys\n\ndef main():\n    ",
    "def fibonacci(n):\n    ",
    'class Stack:\n    """A last-in, first-out collection."""\n\n    def __init__(self):\n        ',
    "    try:\n        with open(filename) as f:\n            ",
    "class TestParser(unittest.TestCase):\n    def test_",
    "for key, value in ",
)
QUESTIONS = (
    "What does textwrap.dedent do?",
    "What is ValueError?",
    "What does str.upper do?",
    "Who are you?",
)
TOKENS = 60


def require_plotting() -> None:
    """Fail before hours of training, not after, where the loss curve can't be drawn."""
    if find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "train")


def write_card(folder: Path, runs: Path, corpus: Corpus, recipe: Recipe) -> Path:
    """Measure the model in `folder` and write its card there; the numbers also go to `runs/card.json`."""
    require_plotting()
    facts = measure(folder, runs, corpus, recipe)
    (runs / "card.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    draw_losses(runs, folder / "loss.png")
    card = folder / "README.md"
    card.write_text(render(facts, recipe), encoding="utf-8")
    return card


def measure(folder: Path, runs: Path, corpus: Corpus, recipe: Recipe) -> dict[str, Any]:
    """All numbers and samples of the card."""
    model, tokenizer = load(folder)
    chat = conversations(corpus.train, share=recipe.chat_share, seed=recipe.seed)
    learned = [document.text.encode() for document in [*corpus.train, *chat]]
    kept = [document.text.encode() for document in corpus.held_out]
    alone, after = xz_bits_per_byte(b"\0".join(learned), b"\0".join(kept))
    log = read_log(runs)
    tail = log[-100:]
    return {
        "python": platform.python_version(),
        "parameters": model.parameter_count(),
        "weights": (folder / "model.safetensors").stat().st_size,
        "bytes": json.loads((runs / "corpus.json").read_text(encoding="utf-8"))["bytes"],
        "files": {"train": len(corpus.train), "held_out": len(corpus.held_out)},
        "held_out_names": [document.name for document in corpus.held_out],
        "steps": len(log),
        "tokens": log[-1]["tokens"],
        "seconds": log[-1]["seconds"],
        "train_loss": sum(line["loss"] for line in tail) / len(tail),
        "bpb": {
            "this model": bits_per_byte(model, tokenizer, list(corpus.held_out)),
            "5-gram": ngram_bits_per_byte(learned, kept),
            "xz alone": alone,
            "xz after the training text": after,
        },
        "samples": [
            (
                prompt,
                *(
                    complete(model, tokenizer, prompt, tokens=TOKENS, temperature=t)
                    for t in (0.0, 0.6)
                ),
            )
            for prompt in PROMPTS
        ],
        "answers": [
            (question, complete(model, tokenizer, asked(question), tokens=TOKENS, temperature=0.0))
            for question in QUESTIONS
        ],
    }


def draw_losses(runs: Path, path: Path) -> None:
    """Training loss, its running mean and the held-out loss, against tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log = read_log(runs)
    tokens = [line["tokens"] / 1e6 for line in log]
    losses = [line["loss"] for line in log]
    smooth, mean = [], losses[0]
    for index, loss in enumerate(losses):
        mean += max(0.03, 1 / (index + 1)) * (loss - mean)
        smooth.append(mean)
    held = [(line["tokens"] / 1e6, line["held_out"]) for line in log if "held_out" in line]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=100)
    axes.plot(tokens, losses, color="#c9d6e8", linewidth=0.6, label="training, each step")
    axes.plot(tokens, smooth, color="#24527a", linewidth=1.4, label="training, running mean")
    axes.plot(
        *zip(*held, strict=True), color="#c4572c", marker="o", markersize=3, label="held-out files"
    )
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("loss (nats a token)")
    axes.set_ylim(top=min(max(losses), 7.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def render(facts: dict[str, Any], recipe: Recipe) -> str:
    """The text of the card."""
    return "\n".join(
        [
            *_head(facts),
            *_data(facts, recipe),
            *_recipe(facts, recipe),
            *_results(facts),
            *_limits(),
        ]
    )


def _head(facts: dict[str, Any]) -> list[str]:
    return [
        "---",
        "license: other",
        "license_name: psf-2.0",
        "language: [code, en]",
        "pipeline_tag: text-generation",
        "tags: [python, qwen3]",
        "---",
        "",
        "# Penstock's default model",
        "",
        f"A Qwen3-shaped decoder of {facts['parameters'] / 1e6:.1f} million parameters "
        f"({facts['weights'] / 1e6:.1f} MB of bf16 weights) that completes Python code. `penstock train default` "
        f"made it from nothing in {facts['seconds'] / 60:.0f} minutes on two busy CPU cores, without any other "
        "model's weights, tokens or outputs. It is there so that serving can be tried at once, offline, with real "
        "weights.",
        "",
    ]


def _data(facts: dict[str, Any], recipe: Recipe) -> list[str]:
    sizes = {name: f"{size / 1e6:.2f} MB" for name, size in facts["bytes"].items()}
    return [
        "## Data",
        "",
        f"The sources and docs of the standard library of Python {facts['python']}, as found on any installation, "
        f"under the PSF licence: {facts['files']['train']} files and topics to learn from, "
        f"{facts['files']['held_out']} held out by a hash of their names.",
        "",
        "| part | size |",
        "|---|---|",
        f"| sources | {sizes['code']} |",
        f"| docs (the language reference inside `pydoc_data`, text files) | {sizes['docs']} |",
        f"| one in sixteen files of the test-suite | {sizes['tests']} |",
        f"| questions and answers made from docstrings of the files above and of built-ins | {sizes['chat']} |",
        f"| held out (never tests) | {sizes['held_out']} |",
        "",
        "Left out: the rest of the test-suite, generated character tables, files that aren't UTF-8, exact "
        f"duplicates, files over 400 kB. Chat text is at most {recipe.chat_share:.0%} of the rest.",
        "",
        f"Held out: {', '.join(f'`{name}`' for name in facts['held_out_names'])}.",
        "",
    ]


def _recipe(facts: dict[str, Any], recipe: Recipe) -> list[str]:
    shape = recipe.shape
    contexts = ", ".join(f"{size} until {until:.0%}" for until, size in recipe.contexts)
    return [
        "## Recipe",
        "",
        f"- Shape: {shape.num_hidden_layers} layers, width {shape.hidden_size}, SwiGLU of "
        f"{shape.intermediate_size}, {shape.num_attention_heads} query and {shape.num_key_value_heads} key-value "
        f"heads of {shape.head_dim}, normalised queries and keys, tied embeddings, "
        f"{shape.max_position_embeddings} positions.",
        f"- Tokenizer: byte-level BPE of its own, {shape.vocab_size} tokens, learned from the training files.",
        f"- {facts['steps']} steps of {recipe.tokens_per_step} tokens, {facts['tokens'] / 1e6:.1f} million in all "
        f"({facts['tokens'] / facts['seconds']:.0f} a second); windows grow: {contexts}.",
        f"- Muon for the hidden matrices, AdamW for embeddings and norms; peak rate {recipe.rate}, "
        f"{recipe.warmup:.0%} warm-up, then a straight line to zero; weight decay {recipe.decay}; gradients clipped "
        f"at norm 1; seed {recipe.seed}.",
        "",
        "![loss curve](loss.png)",
        "",
    ]


def _results(facts: dict[str, Any]) -> list[str]:
    rows = [f"| {name} | {bits:.3f} |" for name, bits in facts["bpb"].items()]
    lines = [
        "## Results",
        "",
        "Bits per byte on the held-out files (lower is better). The 5-gram model (bytes, modified Kneser-Ney) and "
        "the second line of xz were given the same training bytes.",
        "",
        "| | bits per byte |",
        "|---|---|",
        *rows,
        "",
        f"Mean training loss over the last steps: {facts['train_loss']:.3f} nats a token.",
        "",
        "## Samples",
        "",
        f"Fixed prompts, first attempt, up to {TOKENS} tokens: greedy, then temperature 0.6.",
        "",
    ]
    for prompt, greedy, warm in facts["samples"]:
        lines += ["Prompt:", "", *_fence(prompt), "Greedy:", "", *_fence(prompt + greedy)]
        lines += ["Temperature 0.6:", "", *_fence(prompt + warm)]
    lines += ["Through the chat template, greedy:", ""]
    for question, answer in facts["answers"]:
        lines += [f"- *{question}* {' '.join(answer.split()) or '(nothing)'}"]
    return [*lines, ""]


def _fence(text: str) -> list[str]:
    return ["~~~python", *text.rstrip().splitlines(), "~~~", ""]


def _limits() -> list[str]:
    return [
        "## What it can't do",
        "",
        "It has the look of the standard library, not its knowledge. A line or two is often well-formed, longer code "
        "seldom is: names are invented, brackets go missing, and greedy decoding soon repeats itself, so sample at a "
        "temperature of 0.4 to 0.8. It was trained briefly and is far from converged. Chat answers sound like "
        "docstrings and are mostly false; system messages are ignored by the template. It knows no language but "
        "Python and the English of its docs, no facts, no arithmetic, and no tools. It has had no safety training. "
        "Text it repeats from the standard library stays under the PSF licence. Use it to try serving, not to "
        "write software.",
        "",
    ]
