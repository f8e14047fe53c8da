"""Dictionaries of image descriptions, in whose words pursuit describes heads.

The paper's, by Gandelsman et al., is a text file with one description a line: `load_dictionary` reads it from a path,
or an address with its checksum. Another comes with an installed source (`residual.sources`).
"""

from __future__ import annotations

from pathlib import Path

from residual.files import cache_folder, checksum
from residual.sources import sources


def load_dictionary(source: str | Path | None = None, *, sha256: str | None = None) -> tuple[str, ...]:
    """Descriptions of images, without repetition, in a fixed order.

    source: None for those of installed sources, else a text file with one description a line, by path
    or by http(s) address. sha256: of the file, which an address requires.
    Raises FileNotFoundError for a missing file, ValueError for one that has another checksum,
    is not text or holds no description, ConnectionError without a network.
    """
    if source is None:
        return tuple(dict.fromkeys(text for one in sources() for text in one.descriptions()))
    if str(source).startswith(("http://", "https://")):
        path = _download(str(source), sha256)
    elif (path := Path(source)).is_file():
        if sha256 and (actual := checksum(path)) != sha256.lower():
            raise ValueError(f"{path} has SHA-256 {actual}, not {sha256}: another or a damaged file")
    else:
        raise FileNotFoundError(f"no dictionary at {path}; give a text file or an http(s) address")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # the lines that an editor shows
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    descriptions = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not descriptions:
        raise ValueError(f"{path} holds no description")
    return descriptions


def _download(address: str, sha256: str | None) -> Path:
    if sha256 is None:
        raise ValueError(f"give the sha256 of {address}: files from a network are checked before use")
    import pooch

    try:
        return Path(pooch.retrieve(address, f"sha256:{sha256}", path=cache_folder() / "dictionaries", progressbar=True))
    except OSError as error:  # of requests, on which pooch builds
        raise ConnectionError(f"cannot fetch {address}: {error}; give the path of a local copy instead") from error
