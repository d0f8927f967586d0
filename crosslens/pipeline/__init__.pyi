from .opening import encoder_shares as encoder_shares
from .opening import open_consensus as open_consensus
from .opening import open_run as open_run
from .opening import parse_activations as parse_activations
from .opening import parse_settings as parse_settings
from .opening import parse_snapshots as parse_snapshots
from .opening import parse_tasks as parse_tasks
