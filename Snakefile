# The run as a graph: units -> chapters -> book. A chapter runs again when its code, its parameters, anything in lib/, a
# table in book/ or constraints.txt has changed, or a table of its own is gone. The book puts outputs and present prose
# together.
import shlex
import sys
from pathlib import Path

from edition.inputs import jobs_by_chapter
from edition.pages import after, chapter_defaults, chapter_path, chapters, find_profile, pages, write_inputs
from edition.results import outputs

PYTHON = shlex.quote(sys.executable)
PROFILE_FILE = find_profile(config.get("profile", "mini"))
PROFILE = PROFILE_FILE.stem
LOGS, RUNS, RESULTS = (f"_build/{name}/{PROFILE}" for name in ("logs", "runs", "results"))
SITE = f"_build/site/{PROFILE}"
DEVICE = config.get("device")
CHAPTERS = chapters()
PLAIN = [page for page in pages() if page not in CHAPTERS]
WRITTEN = write_inputs(PROFILE_FILE)
# Extractions as jobs of their own: for profiles of the hub, or with --config units=1. Chapters make small ones themselves.
UNITS = str(config.get("units", PROFILE in ("small", "paper"))).lower() in ("1", "true", "yes")
JOBS = {chapter: [job.name for job in jobs] for chapter, jobs in jobs_by_chapter(PROFILE_FILE).items()} if UNITS else {}
# What draws the data sets, then the longest chapters and those that others wait for, or cores idle while one ends alone.
FIRST = (
    "selection", "dimension", "alignment", "ground_truth", "similarity", "data", "text_and_code", "pursuit", "semantics",
    "residual_stream",
)  # fmt: skip


def share(jobs):
    """The cores of each of several jobs that run side by side: two chapters on one core each take less time than one
    after the other on two."""
    return max(1, workflow.cores // jobs)


localrules: publish, units, book


rule publish:
    default_target: True
    retries: 0
    input:
        f"{SITE}/_build/html/index.html",
    output:
        f"_build/html/.{PROFILE}",
    message:
        "the book: open _build/html/index.html"
    shell:
        "rm -rf _build/html && cp -r {SITE}/_build/html _build/html && touch {output}"


rule units:
    input:
        sorted({f"_build/units/jobs/{job}" for jobs in JOBS.values() for job in jobs}),


# Extractions have checksums, and are checked when they are read: here it only counts that a job finished.
rule unit:
    output:
        touch("_build/units/jobs/{job}"),
    log:
        f"{LOGS}/units/{{job}}.log",
    message:
        "extracting {wildcards.job}"
    threads: 4 if DEVICE else share(len(CHAPTERS))  # on a GPU they decode images
    resources:
        gpu=1 if DEVICE else 0,
    params:
        profile=shlex.quote(str(PROFILE_FILE)),
        workers=lambda _, threads: threads - 1 if DEVICE else 0,
    shell:
        """
        OMP_NUM_THREADS={threads} {PYTHON} -m edition.inputs {params.profile} {wildcards.job:q} --device {DEVICE} \
            --workers {params.workers} > {log:q} 2>&1
        """.replace("{DEVICE}", DEVICE or "cpu")


for chapter in CHAPTERS:
    on_device = bool(DEVICE) and "device" in chapter_defaults(chapter_path(chapter))

    rule:
        name:
            chapter
        input:
            *(f"{RUNS}/{other}.ipynb" for other in after(chapter)),
            *(f"_build/units/jobs/{job}" for job in JOBS.get(chapter, ())),
            WRITTEN["library"],
            WRITTEN[chapter],
        output:
            notebook=f"{RUNS}/{chapter}.ipynb",
            tables=[f"{RESULTS}/{name}.csv" for name in outputs(chapter).tables],
            folders=[directory(f"{RESULTS}/{name}") for name in outputs(chapter).folders],
        log:
            notebook=f"{LOGS}/{chapter}.ipynb",
        benchmark:
            f"{RUNS}/{chapter}.tsv"
        message:
            f"chapter {chapter}"
        priority: len(FIRST) - FIRST.index(chapter) if chapter in FIRST else 0
        threads: share(2 if on_device else len(CHAPTERS))
        retries: 0
        resources:
            gpu=int(on_device),
        params:
            chapter=chapter,
            profile=shlex.quote(str(PROFILE_FILE)),
            device=f"-p device {DEVICE}" if on_device else "",
        shell:
            """
            OMP_NUM_THREADS={threads} {PYTHON} -m edition.run {params.chapter} --profile {params.profile} --book \
                -p results {RESULTS} {params.device} --out {log.notebook}
            cp {log.notebook} {output.notebook}
            """


rule book:
    input:
        chapters=expand(f"{RUNS}/{{chapter}}.ipynb", chapter=CHAPTERS),
        tables=[f"{RESULTS}/{name}.csv" for chapter in CHAPTERS for name in outputs(chapter).tables],
        texts=expand("book/{chapter}.md", chapter=CHAPTERS),
        plain=[*expand("book/{page}.md", page=PLAIN), "book/references.bib", "_config.yml", "_toc.yml", "profiles/slurm/config.yaml"],
        style=sorted(map(str, Path("book/_static").iterdir())),
    output:
        f"{SITE}/_build/html/index.html",
    log:
        f"{LOGS}/book.log",
    message:
        "pages"
    retries: 0
    params:
        tool=shlex.quote(str(Path(sys.executable).with_name("jupyter-book"))),
    # Warnings are errors.
    shell:
        """
        rm -rf {SITE} && mkdir -p {SITE}/_static && cp {input.plain} {SITE} && cp {input.style} {SITE}/_static
        {PYTHON} -m edition.assemble {RUNS} {SITE} > {log} 2>&1
        {params.tool} build -n -W --keep-going --quiet {SITE} >> {log} 2>&1 || {{ grep -E 'WARNING|ERROR|rror:' {log} >&2; exit 1; }}
        mkdir {SITE}/_build/html/results && cp {RESULTS}/*.csv {SITE}/_build/html/results
        for made in explorer playground; do cp -r {RESULTS}/$made {SITE}/_build/html; done
        """
