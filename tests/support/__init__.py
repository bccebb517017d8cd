"""What tests share: oracles, problems, workers, the emulator, the ahead-of-time compiler."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
