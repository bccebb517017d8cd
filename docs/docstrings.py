"""What mkdocs does to docstrings, which are written to be read in a terminal; see mkdocs.yml.

Roles such as :class:`~dualpipe_ext.Exchange` become code, `::` becomes a colon before an indented
block, and a paragraph that is aligned in columns, or a table, keeps its lines.
"""

import re

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod|attr):`~?([^`]+)`")
ALIGNED = re.compile(r"\S {2,}\S")
SECTION = re.compile(r"\w[\w ]*:\n")  # "Args:" and what stands under it


def in_columns(paragraph: str) -> bool:
    if paragraph.startswith((" ", "-", "*")) or SECTION.match(paragraph):
        return False
    return any(ALIGNED.search(line) for line in paragraph.splitlines())


def to_markdown(text: str) -> str:
    """The docstring's text; `rows   [R, H]` under `w2     [L, H, I]` becomes a block of code."""
    text = ROLE.sub(lambda match: f"`{match[1]}`", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    paragraphs = re.split(r"\n{2,}", text)
    return "\n\n".join(f"```text\n{p}\n```" if in_columns(p) else p for p in paragraphs)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
