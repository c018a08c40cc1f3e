"""How pictures look: colours that every kind of colour vision tells apart, light and dark, and their files."""

import io
import zlib
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context, rcParams
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from jaxcl import marks

# Okabe & Ito 2008, a palette for every kind of colour vision. A strategy's colour does not depend on which others ran.
COLORS = {
    "from_scratch": "#009E73",
    "incremental": "#D55E00",
    "er": "#0072B2",
    "der": "#56B4E9",
    "der_pp": "#CC79A7",
    "agem": "#E69F00",
}
_OTHER_COLORS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#882255")  # Tol's muted palette
STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": "#8a939c",
    "axes.labelcolor": "#39424b",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e8ec",
    "xtick.color": "#5b6670",
    "ytick.color": "#5b6670",
    "legend.frameon": False,
    "text.parse_math": False,  # a label holds a user's words, of which a $ is one
}
# The same on a dark page: what is drawn in the colour of the paper or of the ink, and nothing else, changes.
DARK: Any = {
    "figure.facecolor": "#14181c",
    "axes.facecolor": "#14181c",
    "savefig.facecolor": "#14181c",
    "text.color": "#dfe5ea",
    "axes.edgecolor": "#77828c",
    "axes.labelcolor": "#c3ccd4",
    "grid.color": "#2c343b",
    "xtick.color": "#a3aeb8",
    "ytick.color": "#a3aeb8",
}
BLUES = LinearSegmentedColormap.from_list("blues", ["#f7fafd", "#9cc4e4", "#0072B2", "#023a5c"])


def is_dark() -> bool:
    """Whether the page is, for which a picture is being drawn."""
    return rcParams["figure.facecolor"] == DARK["figure.facecolor"]


def color_of(strategy: str) -> str:
    return COLORS.get(strategy) or _OTHER_COLORS[zlib.crc32(strategy.encode()) % len(_OTHER_COLORS)]


def png(draw: Callable[[], Figure], dark: bool = False) -> bytes:
    """What `draw` draws, in the style of the report, for a light page or a dark one, as a PNG file."""
    found = drawn(draw, dark)
    assert found is not None
    return found


def drawn(draw: Callable[[], Figure | None], dark: bool = False) -> bytes | None:
    """As `png`; None where there is nothing to draw."""
    file = io.BytesIO()
    with rc_context(STYLE | (DARK if dark else {})):  # restored on leaving: a library does not restyle its caller
        figure = draw()
        if figure is None:
            return None
        figure.savefig(file, format="png", dpi=160, metadata=marks.PNG)
    return file.getvalue()
