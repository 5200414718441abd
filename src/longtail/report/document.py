"""A page of results that answers first, as typed values, and its two forms: one self-contained HTML file, and Markdown.

A document has a section for each question (a data set, say): first the answer in a sentence, one table and one picture,
then parts that are folded, each with one sentence on what it says. Every text is a line of Markdown (`code`, **bold**,
[text](address)); what is in it is escaped. Built once, rendered twice; nothing here knows what the numbers mean.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from longtail.report.plots import Figure


class Entry(NamedTuple):
    """A cell of a table with more than its text: the `best` of all, one that leads its column, small lines `under`."""

    text: str
    best: bool = False
    leads: bool = False
    under: tuple[str, ...] = ()


class Table(NamedTuple):
    """The first `left` columns are words, and the first of these names the line; `note` says how to read it."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[Entry | str]]
    left: int
    note: str = ""


class Line(NamedTuple):
    """A line of a list; `key` is what a link can point at."""

    text: str
    key: str = ""


@dataclass(frozen=True)
class Part:
    """What is folded below the answer: `says` is the sentence that is seen before it is opened."""

    title: str
    says: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    lines: Sequence[Line] = ()
    note: str = ""


@dataclass(frozen=True)
class Section:
    """The answer to one question, in this order, then the folded parts."""

    name: str
    answer: str
    more: Sequence[str]
    table: Table | None
    picture: Figure | None
    parts: Sequence[Part]


@dataclass(frozen=True)
class Document:
    """All that is said; `under` stands below the title."""

    title: str
    under: str
    sections: Sequence[Section]


def anchor(*names: str) -> str:
    """What a link to a section or a part points at: `cifar100_if100-how-sure`."""
    return re.sub(r"[^a-z0-9_]+", "-", "-".join(names).lower()).strip("-")


# ---------------------------------------------------------------------------------------------- Markdown


def markdown(document: Document) -> str:
    """The document as Markdown, without its pictures; what they show is said in their place by their alt texts."""
    blocks = [f"# {document.title}", document.under]
    for section in document.sections:
        blocks += [f"## {section.name}", f"**{section.answer}**", *section.more]
        if section.table:
            blocks += [markdown_table(section.table), section.table.note]
        for part in section.parts:
            blocks += [f"### {part.title}", part.says]
            for table in part.tables:
                heading = [f"#### {table.title}"] if table.title != part.title else []
                blocks += [*heading, markdown_table(table), table.note]
            blocks += ["\n".join(f"- {line.text}" for line in part.lines), part.note]
    return "\n\n".join(block for block in blocks if block) + "\n"


def markdown_table(table: Table) -> str:
    """One table; a cell's small lines follow in brackets, what leads is in bold."""
    rules = ["---"] * table.left + ["---:"] * (len(table.header) - table.left)
    lines = [[_markdown_cell(cell) for cell in line] for line in (table.header, rules, *table.lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _markdown_cell(cell: Entry | str) -> str:
    if isinstance(cell, Entry):
        text = re.sub(r"\[([^]]*)\]\(#[^)]*\)", r"\1", cell.text)  # Markdown has none of the page's anchors
        text = f"**{text}**" if cell.best or cell.leads else text
        cell = f"{text} ({'; '.join(cell.under)})" if cell.under else text
    return cell.replace("|", "\\|")


# -------------------------------------------------------------------------------------------------- HTML


def html(document: Document) -> str:
    """The document as one self-contained page: no script, nothing fetched, pictures inside."""
    return templates().get_template("document.html.j2").render(document=document)


@cache
def templates() -> jinja2.Environment:
    """The templates of this folder; a page of another kind can import their styles and macros."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inline": inline, "anchor": lambda names: anchor(*names)}
    environment.tests["entry"] = lambda cell: isinstance(cell, Entry)
    return environment


@cache
def _inline() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False})


def inline(text: str) -> Markup:
    """A line of Markdown as HTML; numbers stay with their spread and unit, long names may break."""
    for mark in (" ± ", " %"):
        text = text.replace(mark, mark.replace(" ", "\u00a0"))
    rendered = str(_inline().renderInline(text))
    return Markup(re.sub(r"(?<=[a-z0-9])_(?=[a-z0-9])(?![^<>]*>)", "_<wbr>", rendered))  # escaped above
