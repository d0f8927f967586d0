from .regimes import REGIMES as REGIMES
from .regimes import Planted as Planted
from .regimes import Regime as Regime
from .scores import crosscoder_rows as crosscoder_rows
from .scores import linked_rows as linked_rows
from .scores import matched as matched
from .scores import recovery as recovery
