"""What the drawings of several appendices share."""

from __future__ import annotations

from dn_lib.teaching import plotting
from dn_lib.teaching.tables import NOTHING as NOTHING

OUTPUTS = ("o", "dq", "dk", "dv", "dbeta")
# Six outputs, sizes or methods side by side: none of them a mechanism of the book.
SERIES = [plotting.STYLES[n] for n in (4, 5, 6, 7)] + [
    {"color": "#5D3A9B", "marker": "^", "linestyle": (0, (1, 1))},
    {"color": "#7F7F7F", "marker": "o", "linestyle": "-"},
]
