"""Training a LLaVA: stage 1 learns the projector, stage 2 everything; a recipe says which parts and how."""

from pumice.train.data import Dataset, JsonDataset, Sample
from pumice.train.loop import train
from pumice.train.recipe import Recipe, read_recipe

__all__ = ["Dataset", "JsonDataset", "Recipe", "Sample", "read_recipe", "train"]
