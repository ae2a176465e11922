"""The classes of the two documentation pages, thin over the one architecture: none yet."""
