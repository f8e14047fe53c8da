# The run as a graph: units -> chapters -> book. A chapter runs again when what its key names has changed (edition/keys):
# its code and parameters, the modules it reaches, the tables it reads, constraints.txt. The book puts outputs and present
# prose together. Extractions have checksums of their own.
import os
import shlex
import sys
from pathlib import Path

from edition.forkserver import SHARED, start_server
from edition.keys import write_keys
from edition.pages import ParameterError, after, chapters, chapters_on_device, find_profile, pages

PYTHON = shlex.quote(sys.executable)

try:
    PROFILE_FILE = find_profile(config.get("profile", "mini"))
except ParameterError as error:
    raise WorkflowError(str(error))
PROFILE = PROFILE_FILE.stem
LOGS = f"_build/logs/{PROFILE}"
CHAPTERS = chapters()
ON_DEVICE = chapters_on_device()
PLAIN = [page for page in pages() if page not in CHAPTERS]
# What draws the data sets, then the longest chapters and those that others wait for, or cores idle while one ends alone.
FIRST = (
    "data", "ground_truth", "selection", "dimension", "alignment",
    "similarity", "zoo", "class_means", "text_and_code", "pursuit", "semantics", "residual_stream",
)  # fmt: skip
DEVICE = config.get("device")
# Extractions as jobs of their own: for profiles of the hub, or with --config units=1. Chapters make small ones themselves.
UNITS = str(config.get("units", PROFILE in ("small", "paper"))).lower() in ("1", "true", "yes")
PARTS = int(config.get("parts", 1))  # jobs that share one extraction
RUN = f"{PYTHON} -m edition.forkserver plan {shlex.quote(str(PROFILE_FILE))} --device {DEVICE or 'cpu'}{' --compile' * bool(config.get('compile'))} --run"
JOBS = {}
if UNITS:
    from edition.plan import jobs_by_chapter

    by_chapter = jobs_by_chapter(PROFILE_FILE).items()
    JOBS = {chapter: [job.name for job in jobs] for chapter, jobs in by_chapter}
KEYS = write_keys(PROFILE_FILE)


def share(jobs):
    """The cores of each of several jobs that run side by side."""
    return max(1, workflow.cores // jobs)


# For jobs on this machine. With a GPU they differ in threads, of which a server has one number; macOS does not let a
# process with these libraries fork.
onstart:
    if workflow.local_exec and not DEVICE and sys.platform == "linux" and not os.environ.get(SHARED):
        start_server(threads=share(len(CHAPTERS)))
        print("Jobs are forks of one process, which imports once for all.", file=sys.stderr)


localrules: publish, units, book


rule publish:
    default_target: True
    input:
        f"_build/site/{PROFILE}/_build/html/index.html",
    output:
        f"_build/html/.{PROFILE}",
    params:
        runs=f"_build/runs/{PROFILE}",
    # A chapter that failed is in the book, with its error; it runs again the next time, and this run has failed.
    shell:
        """
        rm -rf _build/html && cp -r _build/site/{PROFILE}/_build/html _build/html && touch {output}
        failed=$(cd {params.runs} && ls *.failed 2>/dev/null | sed 's/.ipynb.failed//' || true)
        for chapter in $failed; do rm {params.runs}/$chapter.ipynb {params.runs}/$chapter.ipynb.failed; done
        test -z "$failed" || {{ echo "These chapters failed, and their pages show where:" $failed >&2; exit 1; }}
        """


rule units:
    input:
        sorted({f"_build/units/jobs/{job}" for jobs in JOBS.values() for job in jobs}),


# Extractions have checksums, and are checked when they are read: here it only counts that a job finished.
rule unit:
    input:
        [f"_build/units/jobs/{{job}}.{i}-of-{PARTS}" for i in range(PARTS)] if PARTS > 1 else [],
    output:
        touch("_build/units/jobs/{job}"),
    wildcard_constraints:
        job=r"[^/]+--[0-9a-f]{6}",
    log:
        f"{LOGS}/units/{{job}}.log",
    threads: 4 if DEVICE else share(len(CHAPTERS))  # on a GPU they decode images
    retries: 2
    resources:
        gpu=1 if DEVICE else 0,
    params:
        run=RUN,
        workers=lambda _, threads: threads - 1 if DEVICE else 0,
    shell:
        "OMP_NUM_THREADS={threads} {params.run} {wildcards.job:q} --workers {params.workers} > {log:q} 2>&1"


use rule unit as part with:
    input:
        [],
    output:
        touch("_build/units/jobs/{job}.{i}-of-{n}"),
    log:
        f"{LOGS}/units/{{job}}.{{i}}-of-{{n}}.log",
    params:
        run=RUN,
        workers=lambda part, threads: f"{threads - 1 if DEVICE else 0} --part {part.i}/{part.n}",


rule chapter:
    input:
        lambda chapter: [f"_build/runs/{PROFILE}/{other}.ipynb" for other in after(chapter.chapter)],
        lambda chapter: [f"_build/units/jobs/{job}" for job in JOBS.get(chapter.chapter, ())],
        key=lambda chapter: KEYS[chapter.chapter],
    output:
        f"_build/runs/{PROFILE}/{{chapter}}.ipynb",
    log:
        f"{LOGS}/{{chapter}}.log",
    priority: lambda chapter: len(FIRST) - FIRST.index(chapter.chapter) if chapter.chapter in FIRST else 0
    # Chapters run side by side, each on its share of the cores: two on one core each take less time than one after the
    # other on two. Those that need a GPU wait for one another.
    threads: lambda chapter: share(2 if DEVICE and chapter.chapter in ON_DEVICE else len(CHAPTERS))
    resources:
        gpu=lambda chapter: 1 if DEVICE and chapter.chapter in ON_DEVICE else 0,
    params:
        device=lambda chapter: f"-p device {DEVICE}" if DEVICE and chapter.chapter in ON_DEVICE else "",
        cells=f"{LOGS}/{{chapter}}.cells",
        profile=shlex.quote(str(PROFILE_FILE)),
    shell:
        """
        rm -f {output}.failed
        OMP_NUM_THREADS={threads} {PYTHON} -m edition.forkserver run {wildcards.chapter} --profile {params.profile} --out {output} \
            --cells {params.cells} {params.device} > {log} 2>&1 || {{ test $? = 1 && test -f {output} && touch {output}.failed; }}
        """


rule book:
    input:
        chapters=expand(f"_build/runs/{PROFILE}/{{chapter}}.ipynb", chapter=CHAPTERS),
        texts=expand("book/{chapter}.md", chapter=CHAPTERS),
        plain=expand("book/{page}.md", page=PLAIN),
        references="book/references.bib",
        config="_config.yml",
        toc="_toc.yml",
        style=sorted(map(str, Path("book/_static").iterdir())),
        slurm="profiles/slurm/config.yaml",
    output:
        f"_build/site/{PROFILE}/_build/html/index.html",
    log:
        f"{LOGS}/book.log",
    params:
        site=f"_build/site/{PROFILE}",
        runs=f"_build/runs/{PROFILE}",
        results=f"_build/results/{PROFILE}",
        pairs=" ".join(f"book/{c}.md _build/runs/{PROFILE}/{c}.ipynb" for c in CHAPTERS),
    # Warnings are errors, except those of a chapter that failed: then its error must be readable.
    shell:
        """
        strict=$(compgen -G '{params.runs}/*.failed' > /dev/null || echo '-n -W --keep-going')
        rm -rf {params.site} && mkdir -p {params.site}
        cp {input.plain} {input.references} {input.config} {input.toc} {input.slurm} {params.site}
        mkdir {params.site}/_static && cp {input.style} {params.site}/_static
        {PYTHON} -m edition.assemble {params.pairs} {params.results} {params.site} > {log} 2>&1
        {PYTHON} -m edition.book build $strict --quiet {params.site} >> {log} 2>&1
        mkdir {params.site}/_build/html/results && cp {params.results}/*.csv {params.site}/_build/html/results
        for made in explorer playground; do
            if test -d {params.results}/$made; then cp -r {params.results}/$made {params.site}/_build/html; fi
        done
        """
