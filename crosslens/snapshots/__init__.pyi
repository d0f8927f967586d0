from .collection import Snapshots as Snapshots
from .hooks import canonical_hook as canonical_hook
from .hooks import hook_layer as hook_layer
from .saving import SaveSnapshots as SaveSnapshots
from .saving import choose_steps as choose_steps
from .saving import save as save
from .settings import ModelSettings as ModelSettings
from .snapshot import Snapshot as Snapshot
