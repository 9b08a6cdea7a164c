"""Makes the site of the repository's own pages, under their own paths.

mkdocs looks into one folder alone. README, CONTRIBUTING and the committed results lie outside of
`docs`, and their links lead from one to another: with every page where it lies in the repository,
each link leads to the same page here and there, and `mkdocs build --strict` finds a broken one.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
SHOWN = [
    "*.md",
    "docs/*.md",
    "docs/*.svg",
    "benchmarks/NOTES.md",
    "examples/*.py",
    "benchmarks/results/*.md",
    "benchmarks/results/*.json",
    "benchmarks/results/*/*.*",
    "requirements/locked.txt",
]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts the repository's pages in the place of the folder that mkdocs has read."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = sorted(path.relative_to(ROOT) for shown in SHOWN for path in ROOT.glob(shown))
    pages = [
        File(str(path), str(ROOT), config.site_dir, config.use_directory_urls) for path in paths
    ]
    return Files([*theme, *pages])
