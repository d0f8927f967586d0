from .cache import ActivationCache as ActivationCache
from .harvesting import harvest as harvest
from .loader import Activations as Activations
from .plan import Plan as Plan
from .tokens import Dataset as Dataset
from .tokens import token_sequences as token_sequences
