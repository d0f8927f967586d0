from .page import write_report as write_report
from .wandb_log import log_report as log_report
