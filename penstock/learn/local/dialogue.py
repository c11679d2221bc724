"""Small question-and-answer texts made from docstrings, so that the chat template means something to the model."""

from __future__ import annotations

import ast
import builtins
import inspect
import random
import textwrap
from collections.abc import Iterable, Iterator

from penstock.learn.local.corpus import Document

TEXT_END = "<|endoftext|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
TURN_END = "<|end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] in ('user', 'assistant') %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}{% set text = message['content'] | map(attribute='text') | join('') %}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + text + '<|end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ASKED = (
    "What does {name} do?",
    "What is {name}?",
    "Explain {name}.",
    "what does {name} do",
    "Tell me about {name}.",
)
ASKED_FOR_CODE = (
    "Show me the code of {name}.",
    "Write the function {name}.",
    "How is {name} implemented?",
)
LONGEST_ANSWER = 600

Turn = tuple[str, str]


def conversations(documents: Iterable[Document], *, share: float, seed: int) -> list[Document]:
    """Chat documents of one to three turns, of at most `share` of the size of the documents given."""
    documents = list(documents)
    chooser = random.Random(seed)
    turns = [
        turn
        for document in documents
        if document.kind == "code"
        for turn in _turns(document, chooser)
    ]
    turns.extend(_builtin_turns(chooser))
    chooser.shuffle(turns)
    budget = int(share * sum(document.size for document in documents))
    made: list[Document] = []
    while turns and budget > 0:
        taken = [turns.pop() for _ in range(min(len(turns), chooser.choice((1, 1, 1, 2, 3))))]
        text = "".join(
            f"{USER}{question}{TURN_END}{ASSISTANT}{answer}{TURN_END}" for question, answer in taken
        )
        made.append(Document(f"chat/{len(made):06d}", text, "chat"))
        budget -= len(text.encode())
    return made


def _turns(document: Document, chooser: random.Random) -> Iterator[Turn]:
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = document.text.split("\n")
    module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    answer = _first_words(ast.get_docstring(tree))
    if answer:
        yield chooser.choice(ASKED).format(name=f"the {module} module"), answer
    for owner, node in _definitions(tree):
        if node.name.startswith("_"):
            continue
        name = f"{module}.{owner}{node.name}"
        answer = _first_words(ast.get_docstring(node))
        if answer:
            yield chooser.choice(ASKED).format(name=name), answer
        if isinstance(node, ast.FunctionDef) and chooser.random() < 0.25:
            code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            if len(code) <= LONGEST_ANSWER:
                yield chooser.choice(ASKED_FOR_CODE).format(name=name), code


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Top-level classes and functions, and the functions of those classes with their owner's name."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield "", node
        elif isinstance(node, ast.ClassDef):
            yield "", node
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not node.name.startswith("_"):
                    yield f"{node.name}.", member


def _builtin_turns(chooser: random.Random) -> Iterator[Turn]:
    for name in sorted(vars(builtins)):
        thing = getattr(builtins, name)
        if name.startswith("_") or not callable(thing):
            continue
        answer = _first_words(inspect.getdoc(thing))
        if answer:
            yield chooser.choice(ASKED).format(name=name), answer
        if not isinstance(thing, type) or issubclass(thing, BaseException):
            continue
        for member in sorted(vars(thing)):
            answer = (
                None
                if member.startswith("_")
                else _first_words(inspect.getdoc(getattr(thing, member)))
            )
            if answer:
                yield chooser.choice(ASKED).format(name=f"{name}.{member}"), answer


def _first_words(docstring: str | None) -> str | None:
    """The first paragraph as one line, unless it is missing, tiny or long."""
    if not docstring:
        return None
    first = " ".join(docstring.strip().split("\n\n")[0].split())
    return first if 15 <= len(first) <= LONGEST_ANSWER else None
