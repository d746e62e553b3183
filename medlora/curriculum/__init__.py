"""What a phase is made from, as plain values: base, chain of adapters, sources, fingerprint."""
