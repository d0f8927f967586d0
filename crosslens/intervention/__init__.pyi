from .prompt_runs import PromptRuns as PromptRuns
from .splice import CleanRun as CleanRun
from .splice import Edit as Edit
from .splice import Splice as Splice
from .upper import Upper as Upper
from .view import SnapshotView as SnapshotView
from .view import SnapshotViewConfig as SnapshotViewConfig
from .view import snapshot_view as snapshot_view
