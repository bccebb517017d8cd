"""What mkdocs needs to show files that lie outside of docs/; a hook of mkdocs.yml.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages. Links to other files of the repository,
such as results of benchmarks, lead to copies under repository/; a link to a folder is its text.
"""

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def path_in_repository(page: str) -> str:
    """Of a page: docs/api/index.md for api/index.md, README.md for index.md."""
    outside = {page: file for file, page in PAGES.items()}
    return outside.get(page, f"docs/{page}")


def path_in_site(file: str) -> str:
    """Of a file of the repository."""
    if file in PAGES:
        return PAGES[file]
    inside = file.startswith("docs/") and not file.endswith(".py")
    return file.removeprefix("docs/") if inside else f"repository/{file}"


def links_of(page: str, markdown: str):
    """(match, file of the repository) of every relative link."""
    folder = dirname(path_in_repository(page))
    for match in LINK.finditer(markdown):
        yield match, normpath(f"{folder}/{match[3]}" if folder else match[3])


def on_files(files, config):
    for file, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    linked = set()
    for file in list(files.documentation_pages()):
        for _, target in links_of(file.src_uri, file.content_string):
            if path_in_site(target).startswith("repository/") and (ROOT / target).is_file():
                linked.add(target)
    for target in sorted(linked):
        copy = File.generated(config, path_in_site(target), abs_src_path=str(ROOT / target))
        files.append(copy)
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    targets = {match[0]: target for match, target in links_of(here, markdown)}

    def moved(match: re.Match) -> str:
        target = targets[match[0]]
        if (ROOT / target).is_dir():
            return match[2]
        link = relpath(path_in_site(target), dirname(here) or ".")
        return f"{match[1]}[{match[2]}]({link}{match[4] or ''})"

    return LINK.sub(moved, markdown)
