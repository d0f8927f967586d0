from .chart import Chart as Chart
from .chart import new_figure as new_figure
from .entries import figure as figure
from .page import write_report as write_report
from .wandb_log import log_report as log_report
