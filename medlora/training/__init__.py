"""One phase from rows to an adapter, with transformers.Trainer."""

import medlora.kernels  # noqa: F401  # first: it spares what the libraries would import and nobody calls
