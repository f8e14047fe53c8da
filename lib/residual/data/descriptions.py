"""Dictionaries of image descriptions, in whose words pursuit tells what a head sees.

The embedded one is composed here from lists of words and from the names of emoji. The one that the
paper uses, by Gandelsman et al., is a text file with one description a line: `load_dictionary` reads
it from a path, or from an address with its checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pooch

from residual.artwork import vocabulary
from residual.data import cache_folder
from residual.render import COLOURS


def _words(text: str) -> list[str]:
    """The words of a text, with a space where they have an underscore."""
    return [word.replace("_", " ") for word in text.split()]


SHAPES = _words("""
    circle square triangle rectangle diamond star heart cross ring spiral arrow line dot grid cube sphere
    cylinder pyramid crescent oval hexagon wave zigzag arch
""")
PATTERNS = _words("""
    plain striped dotted chequered wavy zigzag gridded shaded cloudy grainy blurry crumpled
""")
MATERIALS = _words("""
    wood metal glass stone paper plastic wool leather brick sand water ice fire smoke gold silver rubber cotton
    clay marble rust fur feathers grass
""")
PLACES = _words("""
    beach forest mountain desert city street village farm garden park kitchen bedroom bathroom office classroom
    hospital church temple castle museum theatre stadium market shop restaurant bar library factory harbour
    airport station bridge island river lake sea sky cave field road tower house palace playground
    construction_site
""")
SEASONS = ["spring", "summer", "autumn", "winter", "Christmas", "Easter", "Halloween", "New Year"]
TIMES = ["at dawn", "in the morning", "at noon", "in the afternoon", "at sunset", "at night", "under the moon"]
WEATHER = ["in the rain", "in the snow", "in the fog", "in a storm", "in the sun", "under clouds", "in the wind"]
MOODS = _words("""
    happy sad angry afraid surprised tired calm bored proud shy sick silly loving lonely excited worried
""")
PEOPLE = _words("""
    man woman child baby boy girl family couple crowd worker doctor cook farmer teacher singer athlete
""")
COUNTS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "many"]
COUNTED = ["object", "animal", "face", "person", "shape", "flower", "fruit", "star"]
PLURALS = {"person": "people"}
STYLES = _words("""
    photograph drawing painting sketch cartoon line_drawing silhouette icon logo emoji poster stamp sticker
    flat_drawing glossy_drawing outlined_drawing negative collage close-up pattern pixel_art map diagram
""")
VIEWS = ["from above", "from below", "from the side", "from afar", "from behind", "upside down", "close to the edge"]
SIZES = ["tiny", "small", "big", "huge", "thin", "thick", "round", "long"]
PLACED = ["at the centre", "at the left", "at the right", "at the top", "at the bottom", "in a corner"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ACTIONS = _words("""
    running jumping swimming flying dancing singing eating drinking sleeping reading writing cooking playing
    driving riding climbing fighting laughing crying working
""")
NAMED = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")  # groups of emoji


def load_dictionary(source: str | Path | None = None, *, sha256: str | None = None) -> tuple[str, ...]:
    """Descriptions of images, without repetition, in a fixed order.

    source: None for the embedded dictionary, else a text file with one description a line, by path
    or by http(s) address. sha256: what the file must hash to; an address cannot do without.
    Raises FileNotFoundError for a path where nothing is, ValueError for a file that hashes to
    something else, is not text or holds no description, ConnectionError without a network.
    """
    if source is None:
        return tuple(dict.fromkeys(_compose()))
    if str(source).startswith(("http://", "https://")):
        path = _download(str(source), sha256)
    elif (path := Path(source)).is_file():
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if sha256 and found != sha256.lower():
            raise ValueError(f"{path} has SHA-256 {found}, not {sha256}: another or a damaged file")
    else:
        raise FileNotFoundError(f"no dictionary at {path}; give a text file or an http(s) address")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    descriptions = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not descriptions:
        raise ValueError(f"{path} holds no description")
    return descriptions


def _download(address: str, sha256: str | None) -> Path:
    if sha256 is None:
        raise ValueError(f"give the sha256 of {address}: what comes over a network is checked before it is used")
    try:
        return Path(pooch.retrieve(address, f"sha256:{sha256}", path=cache_folder() / "dictionaries", progressbar=True))
    except OSError as error:  # of requests, on which pooch builds
        raise ConnectionError(f"cannot fetch {address}: {error}; give the path of a local copy instead") from error


def _compose() -> Iterator[str]:
    colours = tuple(COLOURS)
    yield from (f"{_a(colour)} {thing}" for colour in colours for thing in ("object", "animal", "flag", "background"))
    yield from (f"{_a(colour)} {shape}" for colour in colours for shape in SHAPES)
    yield from (f"{first} and {second}" for i, first in enumerate(colours) for second in colours[i + 1 :])
    yield from (f"shades of {colour}" for colour in colours)
    yield from (f"{_a(size)} {shape}" for size in SIZES for shape in SHAPES)
    yield from (f"{_a(pattern)} {thing}" for pattern in PATTERNS for thing in ("pattern", "background", "flag"))
    yield from (f"{_a(pattern)} {colour} surface" for pattern in PATTERNS for colour in colours)
    yield from (f"something made of {material}" for material in MATERIALS)
    yield from (f"a texture of {material}" for material in MATERIALS)
    yield from (f"a picture of {_a(place)}" for place in PLACES)
    yield from (f"{_a(place)} {time}" for place in PLACES[:12] for time in (*TIMES, *WEATHER))
    yield from (f"{season} {thing}" for season in SEASONS for thing in ("colours", "scenery", "decoration", "clothes"))
    yield from (f"{_a(mood)} {thing}" for mood in MOODS for thing in ("face", "person", "animal"))
    yield from (f"a picture of {_a(person)}" for person in PEOPLE)
    yield from (f"someone {action}" for action in ACTIONS)
    yield from (f"{count} {_many(thing, count)}" for count in COUNTS for thing in COUNTED)
    yield from (f"the letter {letter}" for letter in LETTERS)
    yield from (f"the number {number}" for number in range(21))
    yield from (_a(style) for style in STYLES)
    yield from (f"{_a(style)} in {colour}" for style in STYLES for colour in ("black and white", "bright colours"))
    yield from (f"something seen {view}" for view in VIEWS)
    yield from (f"{size} things {place}" for size in SIZES[:4] for place in PLACED)
    yield from (item.name for item in vocabulary() if item.group in NAMED)


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _many(thing: str, count: str) -> str:
    return thing if count == "one" else PLURALS.get(thing, f"{thing}s")
