"""What tests share: tiny models and runs, fakes, servers, clusters."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The root of the checkout."""
