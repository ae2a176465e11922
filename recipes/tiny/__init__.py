"""The recipe of the tiny model: a corpus of one narrow domain, its training and its scores."""
