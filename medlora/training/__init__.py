"""One phase from rows to an adapter, with transformers.Trainer."""
