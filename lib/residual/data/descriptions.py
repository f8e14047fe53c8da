"""Dictionaries of image descriptions, in whose words pursuit describes heads.

The paper's, by Gandelsman et al., is a text file with one description a line. Another comes with an installed source
(`residual.sources`).
"""

from __future__ import annotations

from pathlib import Path

from residual.sources import sources


def load_dictionary(path: str | Path | None = None) -> tuple[str, ...]:
    """Descriptions of images, without repetition, in a fixed order.

    path: of a text file with one description a line; None for those of installed sources.
    Raises FileNotFoundError for a missing file, ValueError for one that is not text or holds no description.
    """
    if path is None:
        return tuple(dict.fromkeys(text for one in sources() for text in one.descriptions()))
    if not (path := Path(path)).is_file():
        raise FileNotFoundError(f"no dictionary at {path}; give a text file with one description a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # the lines that an editor shows
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    descriptions = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not descriptions:
        raise ValueError(f"{path} holds no description")
    return descriptions
