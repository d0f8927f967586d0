"""The layouts in which other projects save crosscoders, a module each; they are named here."""

from __future__ import annotations

from collections.abc import Mapping

from crosslens.sharing.layouts.crosscoding_through_time import CKKISSANE, CROSSCODING_THROUGH_TIME
from crosslens.sharing.layouts.dictionary_learning import DICTIONARY_LEARNING
from crosslens.sharing.layouts.layout import Layout
from crosslens.sharing.layouts.openmoss import OPENMOSS

LAYOUTS: Mapping[str, Layout] = {  # recognised in this order
    "crosscoding_through_time": CROSSCODING_THROUGH_TIME,
    "ckkissane": CKKISSANE,
    "openmoss": OPENMOSS,
    "dictionary_learning": DICTIONARY_LEARNING,
}
