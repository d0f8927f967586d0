from .parallel import Parallel as Parallel
from .parallel import join as join
from .parallel import n_processes as n_processes
