from .collection import Snapshots as Snapshots
from .hooks import canonical_hook as canonical_hook
from .hooks import hook_layer as hook_layer
from .settings import ModelSettings as ModelSettings
from .snapshot import Snapshot as Snapshot
