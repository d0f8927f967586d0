from .accuracy import accuracy_table as accuracy_table
from .prompts import AnswerBatch as AnswerBatch
from .prompts import Answers as Answers
from .prompts import Item as Item
from .prompts import PromptBatch as PromptBatch
from .prompts import Prompts as Prompts
from .task import Task as Task
