"""What the site has beside docs/: pages that live elsewhere in the repository, notebooks as they run, and docstrings.

Pages are brought in where they are, so no text stands twice. Links are written for GitHub, where all of them work; here those
to a page of the site are turned to it, and those to other files of the repository to GitHub.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
# A page of the site, and where it lives.
PAGES = {
    "index.md": "README.md",
    "specification.md": "bdh_spec/SPEC.md",
    "porting.md": "conformance/PORTING.md",
    "vectors.md": "conformance/VECTORS.md",
    "hatchling.md": "bdh_spec/checkpoints/hatchling.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
PACKAGES = {
    "bdh_spec": "The specification, the protocol of ports, and the door to them.",
    "bdh_torch": "The port for PyTorch.",
    "bdh_mlx": "The port for MLX.",
    "bdh_jax": "The port for JAX.",
    "bdh_transformers": "The face for Hugging Face transformers.",
    "bdh_conformance": "The conformance suite.",
    "bdh_train": "The training loop.",
    "bdh_look": "Inside a model.",
}
NOTEBOOKS = "notebooks"
HOME = "https://github.com/bdh-spec/bdh-spec"
OURS = re.compile(rf"(?:{HOME}/(?:blob|tree)|https://raw\.githubusercontent\.com/bdh-spec/bdh-spec)/main/(.*)")
LINK = re.compile(r'(?P<before>\]\(|\bsrc="|\bhref="|^\[[^\]]+\]: )(?P<link>[^)\s"]+)', re.MULTILINE)

log = logging.getLogger("mkdocs.hooks.site")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation with the API, and with the pages of docs/ that it does not name."""
    config.nav = [
        {"API": [f"api/{name}.md" for name in PACKAGES]} if entry == {"API": "api"} else entry for entry in config.nav or []
    ]
    named = str(config.nav)
    rest = [path.name for path in sorted(Path(config.docs_dir).glob("*.md")) if f"'{path.name}'" not in named]
    if rest:
        config.nav.append({"More": rest})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Bring in what docs/ does not hold."""
    for page, path in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for name, says in PACKAGES.items():
        files.append(File.generated(config, f"api/{name}.md", content=f"# `{name}`\n\n{says}\n\n::: {name}\n"))
    for notebook in sorted((Path(config.docs_dir) / NOTEBOOKS).glob("*.ipynb")):
        for made in executed(notebook, config):
            files.append(made)
    return files


def executed(notebook: Path, config: MkDocsConfig) -> list[File]:
    """A notebook after a run of all its cells, as a page and its pictures."""
    held = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # By files, where the default would open ports.
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
        client = NotebookClient(held, km=kernel, timeout=300, startup_timeout=300, resources={"metadata": {"path": folder}})
        client.owns_km = True  # and so ends the kernel
        client.execute()
    told: dict[str, Any] = {"unique_key": notebook.stem, "output_files_dir": notebook.stem}
    text, found = MarkdownExporter().from_notebook_node(held, resources=told)
    page = File.generated(config, f"{NOTEBOOKS}/{notebook.stem}.md", content=text)
    pictures = found["outputs"].items()
    return [page, *(File.generated(config, f"{NOTEBOOKS}/{name}", content=content) for name, content in pictures)]


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn each link to where it leads from the site."""
    here = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def turned(found: re.Match[str]) -> str:
        return found["before"] + target(found["link"], here, page.file.src_uri, files)

    return LINK.sub(turned, markdown)


def target(link: str, here: str, page: str, files: Files) -> str:
    """Where a link of the file ``here`` leads from a page of the site."""
    address, mark, anchor = link.partition("#")
    ours = OURS.fullmatch(address)
    if not ours and (":" in address or not address):
        return link
    path = ours[1] if ours else posixpath.normpath(posixpath.join(posixpath.dirname(here), address))
    there = next((name for name, lives in PAGES.items() if lives == path), path.removeprefix("docs/"))
    there = re.sub(rf"^({NOTEBOOKS}/.*)\.ipynb$", r"\1.md", there)
    if (there in PAGES or path.startswith("docs/")) and files.get_file_from_path(there):
        return posixpath.relpath(there, posixpath.dirname(page) or ".") + mark + anchor
    if not (ROOT / path).exists():
        log.warning("%s links to %s, which is not there", here, link)
    return f"{HOME}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}{mark}{anchor}"


os.environ.setdefault("BDH_BACKEND", "numpy")  # notebooks run by the specification, whatever is installed
