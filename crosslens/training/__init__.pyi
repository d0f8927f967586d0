from . import recipes as recipes
from .config import TrainConfig as TrainConfig
from .evaluation import evaluate as evaluate
from .evaluation import reconstruction_table as reconstruction_table
from .initialisation import initialise as initialise
from .run import train as train
from .seeds import train_seeds as train_seeds
from .trainer import CrosscoderTrainer as CrosscoderTrainer
