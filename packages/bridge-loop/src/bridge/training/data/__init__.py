"""The data of a run: the order of the samples, the loaders, the plan of an evaluation."""
