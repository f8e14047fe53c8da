# The run as a graph: chapters -> book. A chapter is run again when its text, its profile, the library, its
# published numbers or its place in the table of contents changed. Extractions have checksums of their own.
import shlex
import sys
from pathlib import Path

import yaml

PYTHON = shlex.quote(sys.executable)

PROFILE = config.get("profile", "mini")
if not Path(f"profiles/{PROFILE}.yml").is_file():
    names = ", ".join(sorted(p.stem for p in Path("profiles").glob("*.yml")))
    raise WorkflowError(f"unknown profile {PROFILE!r}; profiles/ has {names}")
CHAPTERS = [entry["file"] for entry in yaml.safe_load(Path("_toc.yml").read_text())["chapters"]]
LIBRARY = sorted(str(p) for p in Path("lib/residual").rglob("*") if p.is_file() and p.suffix != ".pyc")


rule all:
    default_target: True
    input:
        f"_build/html/.{PROFILE}",


rule chapter:
    input:
        text="book/{chapter}.md",
        profile=f"profiles/{PROFILE}.yml",
        library=LIBRARY,
        published=sorted(str(p) for p in Path("book/published").glob("*.csv")),
        installed="constraints.txt",
    output:
        f"_build/runs/{PROFILE}/{{chapter}}.ipynb",
    threads: workflow.cores  # a chapter uses all cores itself
    shell:
        "{PYTHON} -m residual.chapters {input.text} --profile {input.profile} --out {output}"


rule book:
    input:
        chapters=expand(f"_build/runs/{PROFILE}/{{chapter}}.ipynb", chapter=CHAPTERS),
        intro="book/intro.md",
        references="book/references.bib",
        config="_config.yml",
        toc="_toc.yml",
    output:
        touch(f"_build/html/.{PROFILE}"),
    params:
        site=f"_build/site/{PROFILE}",
    shell:
        """
        rm -rf {params.site} && mkdir -p {params.site}
        cp {input} {params.site}
        {PYTHON} -m jupyter_book build -n -W --keep-going --quiet {params.site}
        rm -rf _build/html && cp -r {params.site}/_build/html _build/html
        """
