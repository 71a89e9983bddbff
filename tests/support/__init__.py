"""What tests of several layers share: problems, oracles, layouts, tiny models."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Of the repository."""
