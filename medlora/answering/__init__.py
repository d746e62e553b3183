"""A model answers questions."""

import medlora.kernels  # noqa: F401  # first: it spares what the libraries would import and nobody calls
